"""How far each request is, on stderr: bars on a terminal, else a plain line every 10 %. Results go to stdout."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from sgld.events import Progress, Queued, Restarted, Stage, Started

Shown = Queued | Started | Progress | Restarted
Clock = Callable[[], float]
_LABEL_LENGTH = 40


@dataclass(frozen=True)
class Output:
    """One output of one prompt, as the user counts them: from 1, of `total` in all."""

    number: int
    total: int
    prompt: str

    @property
    def label(self) -> str:
        """What stands before its lines."""
        text = " ".join(self.prompt.split())
        short = text if len(text) <= _LABEL_LENGTH else text[: _LABEL_LENGTH - 1] + "…"
        return f"[{self.number}/{self.total}] {short}" if self.total > 1 else short or "output"


class Display(Protocol):
    """Where progress is shown, and where lines go while it is."""

    def show(self, output: Output, event: Shown) -> None:
        """Show what happened to an output."""

    def end(self, output: Output) -> None:
        """Nothing more will happen to an output."""

    def result(self, line: str) -> None:
        """Print a result on stdout."""

    def note(self, line: str) -> None:
        """Print a line for people on stderr."""


@contextmanager
def open_display() -> Iterator[Display]:
    """The display that fits stderr."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield Lines()
        return
    bars = Bars(Console(stderr=True))
    with bars.progress:
        yield bars


def counted(event: Progress) -> str:
    """Which step is done, and of what."""
    return f"{'step' if event.stage == 'denoise' else 'post-processing'} {event.step}/{event.num_steps}"


def speed(event: Progress, elapsed_s: float) -> str:
    """Steps per second so far and the time that is left, as the engine predicts it or else at this speed."""
    rate = event.step / elapsed_s if elapsed_s > 0 else 0.0
    left_s = (event.num_steps - event.step) / rate if event.eta_s is None and rate else event.eta_s
    eta = "" if left_s is None else f", ETA {duration(left_s)}"
    return f"{rate:.2f} it/s{eta}" if rate else eta.lstrip(", ")


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s` or `3:07`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 60 else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def waiting(event: Queued) -> str:
    """How long the queue is, and how long it takes if that is known."""
    ahead = f"queued, {event.position} before it" if event.position else "queued, next"
    return ahead if event.eta_s is None else f"{ahead}, done in {duration(event.eta_s)}"


def print_result(line: str) -> None:
    """Print on stdout; a reader that left (`| head -1`) doesn't end the work."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        # Python flushes stdout again at exit, which must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Lines:
    """A plain line for every 10 % of an output."""

    def __init__(self, stream: TextIO | None = None, clock: Clock = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._started: dict[Output, float] = {}
        self._tenths: dict[Output, int] = {}
        self._stages: dict[Output, Stage] = {}

    def show(self, output: Output, event: Shown) -> None:
        match event:
            case Started():
                self._started[output] = self._clock()
                self._tenths[output] = 0
            case Progress():
                self._step(output, event)
            case Queued(position=position) if position:
                self.note(f"{output.label}: {waiting(event)}")
            case Queued():
                pass
            case Restarted(attempt=attempt):
                self.note(f"{output.label}: a rank was lost; attempt {attempt}")

    def end(self, output: Output) -> None:
        self._started.pop(output, None)
        self._tenths.pop(output, None)
        self._stages.pop(output, None)

    def result(self, line: str) -> None:
        print_result(line)

    def note(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def _step(self, output: Output, event: Progress) -> None:
        if self._stages.get(output, "denoise") != event.stage:
            self._stages[output], self._tenths[output], self._started[output] = event.stage, 0, self._clock()
        tenths = 10 * event.step // event.num_steps
        if tenths == self._tenths.get(output, 0):
            return
        self._tenths[output] = tenths
        now = self._clock()
        percent = 100 * event.step // event.num_steps
        done = f"{counted(event)} ({percent} %)"
        self.note(f"{output.label}: {done}, {speed(event, now - self._started.get(output, now))}")


class Bars:
    """A bar for every output that runs; it vanishes when the output is done."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self.progress = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
            transient=True,
            # stdout is for results: rich would send it to its console, which is stderr.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._clock = clock
        self._started: dict[Output, float] = {}
        self._tasks: dict[Output, TaskID] = {}
        self._stages: dict[Output, Stage] = {}

    def show(self, output: Output, event: Shown) -> None:
        match event:
            case Queued():
                self._update(output, waiting(event))
            case Started():
                self._started[output] = self._clock()
                self._update(output, "started")
            case Restarted(attempt=attempt):
                self._update(output, f"a rank was lost; attempt {attempt}")
            case Progress():
                now = self._clock()
                if self._stages.get(output, "denoise") != event.stage:
                    self._stages[output], self._started[output] = event.stage, now
                elapsed_s = now - self._started.get(output, now)
                self._update(output, f"{counted(event)}, {speed(event, elapsed_s)}")
                self.progress.update(self._tasks[output], completed=event.step, total=event.num_steps)

    def end(self, output: Output) -> None:
        self._stages.pop(output, None)
        if output in self._tasks:
            self.progress.remove_task(self._tasks.pop(output))

    def result(self, line: str) -> None:
        with self._hidden():
            print_result(line)

    def note(self, line: str) -> None:
        with self._hidden():
            print(line, file=sys.stderr, flush=True)

    def _update(self, output: Output, status: str) -> None:
        if output not in self._tasks:
            self._tasks[output] = self.progress.add_task(output.label, total=None, status=status)
        self.progress.update(self._tasks[output], status=status)

    @contextmanager
    def _hidden(self) -> Iterator[None]:
        """Take the bars away for a line that may go to the same terminal."""
        self.progress.stop()
        try:
            yield
        finally:
            self.progress.start()
