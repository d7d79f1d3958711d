"""How much faster is sgld than plain diffusers, on the same model, weights, seeds and GPU, in one run?

    python bench/compare.py --out bench/results/compare_gpu [--rows flux-256 ...] [--sides eager compiled sgld http]

Models of real size with random weights are made (bench/real_models.py), then each side measures in a process of its
own (bench/sides.py says what the sides are). First requests are told apart; of the others the median counts, each with
a prompt and a seed of its own. Times are those of whole requests up to pictures or frames in memory; of HTTP requests
up to the PNG at the client. The report is written whenever something is known, also when the run is ended early.
With `--seconds` what no longer fits is left out, and said. Models are kept with `--keep`, and used again.
`--tiny --device cpu` tries it out.
"""

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import reports
from budget import Budget
from compared import PAIRS, text
from real_models import MODELS
from rows import CHOSEN, ROWS, Row
from served import CACHES
from sides import EARLY, SIDES
from stuck import show_stacks

HERE = Path(__file__).parent
_LEAVE_S = 30.0
# Of the time, where it is limited: sgld measures twice, and waits for a compiler between.
_SHARES = {"sgld": 3, "http": 3}
_MAX_PROBLEM_CHARS = 8000
# What sides say, and the list of the report that it is put into.
_LISTS = {"measured": "measured", "start": "starts", "settling": "settling", "ticks": "ticks", "skipped": "skipped"}
# The models in this order, each in turns; the folder of one is gone before the next is made.
_ORDER = ("flux", "sdxl", "wan", "qwen-image", "z-image", "sd3.5-medium")


class Comparison:
    """What is known so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._began = time.monotonic()
        self._budget = Budget(args.seconds)
        self.report: dict[str, Any] = {
            "command": reports.command(),
            **reports.where(args.device),
            "options": json.loads(args.options),
            "models": [],
            "measured": [],
            "starts": [],
            "decisions": {},
            "pictures": {},
            "settling": [],
            "ticks": [],
            "skipped": [],
            "problems": [],
        }

    def model(self, name: str, rows: Sequence[Row], num_models: int) -> None:
        """Make the model, measure its rows, and remove it.

        :param num_models: that are still to come, this one included.
        """
        root = self._args.models / name
        with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
            if not self._args.keep:
                stack.callback(shutil.rmtree, root, ignore_errors=True)
            pictures = Path(temporary)
            caches = self._args.caches or pictures
            # They import what they need while the model is made.
            waiting = []
            for side in self._args.sides:
                if more := self._rows_of(side, name, rows):
                    command = ["sides.py", side, name, str(root), temporary, *more]
                    # A server finds what the engine kept.
                    own = "ours" if side in ("sgld", "http") else side
                    waiting.append((side, stack.enter_context(self._process(command, caches / own))))
            command = ["real_models.py", str(self._args.models), name]
            maker = stack.enter_context(self._process(command, caches / "make"))
            for line in self._lines(maker, "make", name, None):
                self.report["models"].append(line)
            for index, (side, process) in enumerate(waiting):
                to_come = sum(_SHARES.get(other, 1) for other, _ in waiting[index:])
                later = (num_models - 1) * sum(_SHARES.get(other, 1) for other in self._args.sides)
                seconds = self._budget.share(_SHARES.get(side, 1), to_come + later)
                for line in self._lines(process, side, name, seconds):
                    self._add(name, line)
                self._compare_pictures(pictures, rows)
                self.write()

    def _rows_of(self, side: str, name: str, rows: Sequence[Row]) -> list[str]:
        """What a side measures, and how; nothing where it measures none."""
        chosen = [row.name for row in rows if (row.kind == "http") == (side == "http")]
        if not chosen or (side == "max-autotune" and name != "sdxl"):
            return []
        names = ("repeats", "early", "settle_s", "ready_s", "options")
        settings = {name.replace("_", "-"): getattr(self._args, name) for name in names}
        return [*chosen, *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]

    def _add(self, name: str, line: dict[str, Any]) -> None:
        for kind, value in line.items():
            if kind == "decisions":
                self.report["decisions"][name] = value
            elif kind == "measured":
                # Of what is measured again, or known better, the later one counts.
                known = self.report["measured"]
                self.report["measured"] = [
                    *(m for m in known if (m["row"], m["side"]) != (value["row"], value["side"])),
                    value,
                ]
            elif kind in _LISTS:
                self.report[_LISTS[kind]].append(value)
        self.write()

    @contextmanager
    def _process(self, args: Sequence[str], caches: Path) -> Iterator["Process"]:
        """One that waits for a line on its stdin; it is ended with its children."""
        extra = ["--device", self._args.device, *(["--tiny"] if self._args.tiny else [])]
        command = [sys.executable, "-W", "ignore", str(HERE / args[0]), *args[1:], *extra]
        environment = {**os.environ, **{variable: str(caches / variable.lower()) for variable in CACHES}}
        with tempfile.TemporaryFile("a+") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,
            )
            try:
                yield Process(process, log)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _lines(self, process: "Process", what: str, name: str, seconds: float | None) -> Iterator[Any]:
        """What it says when it is told to begin, a JSON value for each line, until its time is up.

        :param seconds: that it has; it may finish what it is doing then.
        """
        deadline = time.monotonic() + self._args.limit_s
        self._say(name, what, "begins" + (f", has {seconds:.0f} s" if seconds is not None else ""))
        try:
            for line in process.lines(deadline, seconds):
                self._say(name, what, line.strip()[:400])
                if line.startswith("{"):
                    yield json.loads(line)
            code = process.popen.wait(_LEAVE_S)
        except KeyboardInterrupt:
            show_stacks(process.popen.pid)
            self._problem(name, what, f"{process.said()}\nthe run was ended while it went on")
            raise
        except (queue.Empty, subprocess.TimeoutExpired):
            show_stacks(process.popen.pid)
            self._problem(name, what, f"{process.said()}\nnot done after {self._args.limit_s:.0f} s")
        else:
            if code:
                self._problem(name, what, f"code {code}: {process.said()}")
        self._say(name, what, "ended")

    def _say(self, name: str, what: str, line: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s {name} {what}: {line}", flush=True)

    def _problem(self, name: str, what: str, text: str) -> None:
        self.report["problems"].append(f"{name}, {what}: {text}")
        print(self.report["problems"][-1], flush=True)

    def _compare_pictures(self, folder: Path, rows: Sequence[Row]) -> None:
        for row in rows:
            found = {file.name.split(".npy")[0].rpartition(".")[2]: file for file in folder.glob(f"{row.name}.*.npy")}
            for one, other in PAIRS:
                if {one, other} <= found.keys():
                    error = relative_error(np.load(found[one]), np.load(found[other]))
                    self.report["pictures"].setdefault(row.name, {})[f"{one} to {other}"] = round(error, 5)

    def write(self) -> None:
        if self._args.out:
            self._args.out.parent.mkdir(parents=True, exist_ok=True)
            reports.write(self._args.out, self.report, text(self.report))


@dataclass
class Process:
    """A process, and where it complains."""

    popen: "subprocess.Popen[str]"
    log: IO[str]

    def lines(self, deadline: float, seconds: float | None) -> Iterator[str]:
        """Let it begin; the lines that it writes.

        :param seconds: that it has.

        :raises queue.Empty: there is no further one at the deadline, and it hasn't ended.
        """
        assert self.popen.stdin is not None
        with suppress(BrokenPipeError):
            self.popen.stdin.write(f"{'' if seconds is None else seconds}\n")
            self.popen.stdin.close()
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._forward, args=(lines,), daemon=True).start()
        while (line := lines.get(timeout=max(deadline - time.monotonic(), 0.001))) is not None:
            yield line

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()[-_MAX_PROBLEM_CHARS:]

    def _forward(self, lines: "queue.Queue[str | None]") -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            lines.put(line)
        lines.put(None)


def relative_error(one: Any, other: Any) -> float:
    """In the L2 norm, of pixels in [-1, 1]."""
    a, b = (value.astype(np.float32) / 127.5 - 1 for value in (one, other))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(CHOSEN))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["eager", "compiled", "sgld", "http"])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--early",
        default="all",
        choices=EARLY,
        help="rows that sgld measures before things are compiled, too; of others it runs a first request then",
    )
    parser.add_argument(
        "--settle-s", type=float, default=100.0, help="of sgld, at most, for what is compiled and captured"
    )
    parser.add_argument("--ready-s", type=float, default=120.0, help="seconds until sgld must be ready")
    parser.add_argument("--seconds", type=float, help="what is to come has so many; what doesn't fit is left out")
    parser.add_argument("--limit-s", type=float, default=600.0, help="seconds after which a side is ended")
    parser.add_argument("--options", default="{}", help="JSON: options of sgld, as of its config file")
    parser.add_argument("--models", type=Path, default=Path("/dev/shm/sgld-bench"), help="where models are made")
    parser.add_argument("--caches", type=Path, help="where caches of compiled code are kept; by default nowhere")
    parser.add_argument("--keep", action="store_true", help="keep the models, for other benches and later runs")
    parser.add_argument("--tiny", action="store_true", help="models with next to no layers, to try the script")
    parser.add_argument("--out", type=Path, help="writes FILE.json and FILE.md")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    comparison = Comparison(args)
    chosen = [ROWS[name] for name in args.rows]
    models = [name for name in _ORDER if any(row.model == name for row in chosen)]
    with suppress(KeyboardInterrupt):
        for index, name in enumerate(models):
            comparison.model(name, [row for row in chosen if row.model == name], len(models) - index)
    comparison.write()
    print(text(comparison.report))


if __name__ == "__main__":
    assert set(_ORDER) == set(MODELS)
    main()
