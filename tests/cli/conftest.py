"""An engine without a model, and the command line run with it."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio
import numpy as np
import pytest

from sgld import errors
from sgld.config import EngineConfig
from sgld.events import AnyEvent, Completed, Failed, Progress, Queued, Started
from sgld.request import NO_LIMITS, Limits
from sgld.sampling_params import SamplingParams
from sgld_cli.main import main

REFUSALS: dict[str, Callable[[str], errors.SgldError]] = {
    **{error.code: error for error in (errors.InvalidRequest, errors.QueueFull, errors.ModelError)},
    "model_lost": errors.ModelLost,
}


class FakeEngine:
    """An engine that paints its seed. Prompts say what else shall happen:

    `fail CODE` ends as Failed after a step, `refuse CODE` is refused, `hang` never goes on after its first step;
    `rate X` is a video of that frame rate, `wide N` one of that width;
    `layers N` has so many pictures, `film` is a video with sound, `sound` has no pictures.
    """

    def __init__(self, config: EngineConfig) -> None:
        if config.model_path == "missing":
            raise errors.ModelError("There is no model 'missing'.")
        self.config = config
        self.params: list[SamplingParams] = []
        self.ended: list[str] = []
        self.recorded: list[str] = []
        self.hanging = anyio.Event()
        self.is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.is_closed = True

    def record(self, event: AnyEvent, label: str, start_s: float, end_s: float) -> None:
        """Notes what was written."""
        assert start_s <= end_s
        self.recorded.append(f"{event.request_id} {event.output_index} {label}")

    async def generate(self, params: SamplingParams, *, limits: Limits = NO_LIMITS) -> AsyncGenerator[AnyEvent, None]:
        """The events of a request, as sgld.engine.engine.Engine.generate gives them."""
        self.params.append(params)
        self.limits = limits
        verb, _, code = params.prompt.partition(" ")
        if verb == "refuse":
            raise REFUSALS[code]("it was refused")
        try:
            for index in range(params.num_outputs_per_prompt):
                async for event in self._output(params.output(index), index, verb, code):
                    yield event
        finally:
            self.ended.append(params.prompt)

    async def _output(self, params: SamplingParams, index: int, verb: str, code: str) -> AsyncGenerator[AnyEvent, None]:
        request_id, num_steps = f"request-{len(self.params)}", params.num_inference_steps or 4
        yield Queued(request_id=request_id, output_index=index, position=index, eta_s=None)
        yield Started(request_id=request_id, output_index=index)
        for step in range(1, num_steps + 1):
            await anyio.lowlevel.checkpoint()
            yield Progress(request_id=request_id, output_index=index, step=step, num_steps=num_steps, eta_s=None)
            if verb == "hang":
                self.hanging.set()
                await anyio.sleep_forever()
            if verb == "fail":
                yield Failed(request_id=request_id, output_index=index, code=code, message="it\nbroke")
                return
        fps = float(code) if verb == "rate" else params.fps
        width = int(code) if verb == "wide" else params.width or 24
        shape = (params.num_frames or 1, params.height or 16, width, 3)
        frames = np.full(shape, params.seed % 256, np.uint8)
        if verb == "layers":
            frames = np.full((int(code), 16, 24, 4), params.seed % 256, np.uint8)
        audio = np.zeros((2, 12_000), np.float32) if verb in ("sound", "film") else None
        if verb == "sound":
            frames = frames[:0, :0, :0]
        yield Completed(
            request_id=request_id,
            output_index=index,
            frames=frames,
            seed=params.seed,
            fps=fps,
            elapsed_s=0.5,
            is_video=len(frames) > 1 and verb != "layers",
            audio=audio,
            sample_rate=None if audio is None else 24_000,
        )


@dataclass
class Engines:
    """Makes engines and keeps them, to look at what they were asked."""

    made: list[FakeEngine] = field(default_factory=list)

    def __call__(self, config: EngineConfig) -> FakeEngine:
        self.made.append(FakeEngine(config))
        return self.made[-1]


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code, and the lines of both streams."""

    code: int
    out: list[str]
    err: list[str]


Sgld = Callable[..., Outcome]


@pytest.fixture
def engines() -> Engines:
    return Engines()


@pytest.fixture
def sgld(engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sgld:
    """Runs `sgld` in an empty folder with a fake engine."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> Outcome:
        code = main(argv, engine_class=engines)
        captured = capsys.readouterr()
        return Outcome(code, captured.out.splitlines(), captured.err.splitlines())

    return run
