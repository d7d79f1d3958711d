"""`sgld generate`: all prompts at once, each output written as soon as it is there."""

import argparse
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, assert_never

import anyio
import msgspec
from anyio.abc import TaskGroup
from anyio.to_thread import run_sync
from av import FFmpegError

from sgld.config import CalibrationConfig, EngineConfig
from sgld.errors import ModelError, SgldError, StorageError
from sgld.events import AnyEvent, Cancelled, Completed, Failed, Frames, Preview, Progress, Queued, Restarted, Started
from sgld.request import Limits
from sgld.sampling_params import SamplingParams
from sgld_cli.errors import BAD_INPUT, FAILED, OK, error_line, exit_code, exit_code_of
from sgld_cli.loading import loading_shown
from sgld_cli.progress import Display, Output, duration, open_display, print_result
from sgld_cli.results import Files, Result, Timings, Written, result_of
from sgld_cli.settings import Setting, Settings, accept, build, given, merge, show
from sgld_cli.sources import read_picture
from sgld_cli.uploads import Uploads, open_uploads

UPLOAD_FAILED = "upload_failed"


class Generates(Protocol):
    """What this command needs of an engine."""

    def generate(self, params: SamplingParams, *, limits: Limits) -> AsyncGenerator[AnyEvent, None]:
        """Stream the events of all outputs of a request."""

    def record(self, event: AnyEvent, label: str, start_s: float, end_s: float) -> None:
        """Show in the trace, if there is one, what was done with an event."""


EngineFactory = Callable[[EngineConfig], AbstractAsyncContextManager[Generates]]


def run(args: argparse.Namespace, engine_class: EngineFactory | None = None) -> int:
    """Run the command; :return: the exit code.

    :param engine_class: makes the engine; None is sgld's own, which is loaded once all input is checked.
    :raises UsageError: the input can't be used.
    """
    merged = merge(_sources(args))
    if args.print_config:
        print_result(show(merged, as_json=args.json))
        return OK
    settings = build(merged)
    files = Files(settings)
    files.prepare()
    return anyio.run(_generate, settings, files, args.json, engine_class or _load_engine())


def _sources(args: argparse.Namespace) -> Iterator[dict[str, Setting]]:
    """What was given, the strongest source first."""
    yield from given(args)
    if args.picture:
        yield accept(read_picture(Path(args.picture)), args.picture)


def _load_engine() -> EngineFactory:
    from sgld.engine.engine import Engine  # takes seconds: only once there is work to do

    return Engine


async def _generate(settings: Settings, files: Files, as_json: bool, engine_class: EngineFactory) -> int:
    async with open_uploads(settings.output.storage) as uploads:
        with open_display() as display, loading_shown(display):
            job = Job(settings, files, display, as_json=as_json, uploads=uploads)
            async with engine_class(
                msgspec.structs.replace(settings.engine, calibration=CalibrationConfig())
            ) as engine:
                await job.run(engine)
            return job.exit_code


@dataclass
class _State:
    """What is known of an output before it is completed."""

    output: Output
    arrived_at: float
    started_at: float | None = None
    num_steps: int | None = None


class Job:
    """Everything that one command line asks for; what fails doesn't stop the rest."""

    def __init__(
        self,
        settings: Settings,
        files: Files,
        display: Display,
        *,
        as_json: bool,
        uploads: Uploads | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._files = files
        self._display = display
        self._as_json = as_json
        self._uploads = uploads
        self._clock = clock
        self._codes: set[int] = set()
        self._said: set[str] = set()

    @property
    def exit_code(self) -> int:
        """A failed generation outweighs bad input."""
        return next((code for code in (FAILED, BAD_INPUT) if code in self._codes), OK)

    async def run(self, engine: Generates) -> None:
        """Generate and write all outputs; returns when the last one is written or has failed."""
        outputs_each = self._settings.params[0].num_outputs_per_prompt
        # A file of prompts may be longer than the engine's queue, which would refuse the rest.
        slots = anyio.Semaphore(max(1, self._settings.engine.max_queued_requests // outputs_each))
        async with anyio.create_task_group() as tasks:
            for index, params in enumerate(self._settings.params):
                await slots.acquire()
                tasks.start_soon(self._prompt, engine, index, params, slots)

    async def _prompt(self, engine: Generates, index: int, params: SamplingParams, slots: anyio.Semaphore) -> None:
        states = self._states(index, params)
        try:
            # Encoding one output must not hold back the events of the others.
            async with anyio.create_task_group() as writers:
                await self._events(engine, params, states, writers)
        finally:
            slots.release()
            for state in states:
                self._display.end(state.output)

    async def _events(
        self, engine: Generates, params: SamplingParams, states: list[_State], writers: TaskGroup
    ) -> None:
        try:
            async with aclosing(engine.generate(params, limits=self._files.limits)) as events:
                async for event in events:
                    state = states[event.output_index]
                    if isinstance(event, Completed):
                        writers.start_soon(self._write, engine, state, params.output(event.output_index), event)
                    else:
                        self._on(state, event)
        except ModelError as error:
            self._codes.add(exit_code_of(error))
            self._say(str(error))  # the same for all prompts: said once, without a prompt
        except SgldError as error:
            self._fail(states[0].output, error.code, str(error))

    def _states(self, index: int, params: SamplingParams) -> list[_State]:
        each = params.num_outputs_per_prompt
        total = each * len(self._settings.params)
        now = self._clock()
        return [_State(Output(index * each + i + 1, total, params.prompt), now) for i in range(each)]

    def _on(self, state: _State, event: AnyEvent) -> None:
        match event:
            case Started():
                state.started_at = self._clock()
                self._display.show(state.output, event)
            case Progress():
                if event.stage == "denoise":
                    state.num_steps = event.num_steps
                self._display.show(state.output, event)
            case Queued() | Restarted():
                self._display.show(state.output, event)
            case Failed():
                self._fail(state.output, event.code, event.message)
            case Cancelled():
                self._fail(state.output, "cancelled", "the engine cancelled it")
            case Preview() | Frames() | Completed():
                pass  # the whole result comes with Completed
            case unknown:
                assert_never(unknown)

    async def _write(self, engine: Generates, state: _State, params: SamplingParams, completed: Completed) -> None:
        before = self._clock()
        try:
            files = await run_sync(self._files.write, state.output, params, completed)
        except SgldError as error:
            self._fail(state.output, error.code, str(error))
            return
        except (OSError, ValueError, ArithmeticError, FFmpegError) as error:
            # All that encoders raise for pixels and rates that they can't take: FFmpegError is none of the others.
            self._fail(state.output, "write_failed", f"the output can't be written: {error}")
            return
        files = await self._uploaded(state.output, files)
        queued_s = None if state.started_at is None else state.started_at - state.arrived_at
        engine.record(completed, "write", before, self._clock())
        timings = Timings(queued_s, completed.elapsed_s, self._clock() - before)
        self._report(state.output, result_of(params, completed, files, state.num_steps, timings))

    async def _uploaded(self, output: Output, files: Written) -> Written:
        """The files with their URLs, where they are uploaded; what can't be stays a file here."""
        if self._uploads is None:
            return files
        try:
            return await self._uploads.upload(files)
        except StorageError as error:
            self._fail(output, UPLOAD_FAILED, f"{error}; the output is here")
            return files

    def _report(self, output: Output, result: Result) -> None:
        self._display.end(output)
        if self._as_json:
            self._display.result(msgspec.json.encode(result).decode())
        else:
            for place in (*result.paths, *result.frame_paths, *result.urls):
                self._display.result(place)
        took = duration(result.timings.elapsed_s)
        steps = f", {result.num_inference_steps} steps" if result.num_inference_steps else ""
        done = "".join(f", {note}" for note in result.postprocessing)
        self._display.note(f"{output.label}: seed {result.seed}, {result.size}{steps}{done}, {took}")

    def _fail(self, output: Output, code: str, message: str) -> None:
        self._display.end(output)
        self._codes.add(exit_code(code))
        self._say(f"{output.label}: {message}" if output.total > 1 else message)

    def _say(self, message: str) -> None:
        line = error_line(message)
        if line not in self._said:
            self._said.add(line)
            self._display.note(line)
