"""An engine that tells what a test wants, and a real server around it."""

import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio
import httpx2
import numpy as np

from sgld import errors
from sgld.config import EngineConfig, LoraConfig, ServerConfig
from sgld.engine.adapters import EngineLoras
from sgld.engine.statistics import Statistics
from sgld.events import AnyEvent, Completed, Failed, Frames, Preview, Progress, Queued, Started
from sgld.media.inputs import InputPolicy, as_files
from sgld.messages import LoadLora, LoraFailed, LoraLoaded, ModelInfo, UnloadLora
from sgld.request import NO_LIMITS, Limits
from sgld.sampling_params import SamplingParams
from sgld.server.serve import EngineFactory, listen, serve
from sgld.server.services import Services

TIMEOUT_S = 60
CONFIG = EngineConfig(device="cpu", num_cpu_threads=1)
MODEL = ModelInfo(model_path="sgld/tiny-image", pipeline_class="FakePipeline", device="cpu", precisions={}, fps=None)

NOTHING = Statistics(
    uptime_s=0.0,
    num_queued=0,
    num_running=0,
    num_completed=0,
    num_failed=0,
    num_cancelled=0,
    num_restarts=0,
    calls=(),
    merging={},
    costs=(),
    replicas=(),
)


class FakeEngine:
    """An engine that paints its seed. Prompts say what else shall happen:

    `refuse CODE` is refused, `fail CODE` ends as Failed after a step, `break` raises what no engine should, `hang`
    never goes on after its first step, `wait` not before `go` is set, `show` not after its first
    preview before that, `nothing` makes no picture, `layers N` makes N, `picture` makes one where a video was asked
    for, `pause` is a video that stops after half of its frames until `go` is set. With num_frames above 1 there are as
    many frames, and 4 where only a video will do.
    """

    def __init__(self, *, is_ready: bool = True) -> None:
        self.model: ModelInfo | None = MODEL if is_ready else None
        self.params: list[SamplingParams] = []
        self.waited_s: list[float] = []
        self.ended: list[str] = []
        self.limits: list[Limits] = []
        self.hanging = anyio.Event()
        self.go = anyio.Event()
        self.has_ended = anyio.Event()
        self.counted = NOTHING
        self.loras = EngineLoras(LoraConfig(), self._tell)

    def _tell(self, command: LoadLora | UnloadLora) -> list[int]:
        """Adapters are loaded at once; those with `bad` in their path can't be."""
        if isinstance(command, LoadLora):
            about: dict[str, Any] = {"path": command.path, "alpha": command.alpha}
            if "bad" in command.path:
                self.loras.heard(LoraFailed(**about, message=f"{command.path} can't be read"))
            else:
                self.loras.heard(LoraLoaded(**about, size_bytes=100, num_layers={"transformer": 3}))
        return [0]

    def __call__(self, config: EngineConfig) -> Self:
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    async def ready(self) -> ModelInfo:
        """The model."""
        return MODEL

    def statistics(self) -> Statistics:
        """Nothing was counted."""
        return self.counted

    async def generate(
        self, params: SamplingParams, *, inputs: InputPolicy, waited_s: float = 0.0, limits: Limits = NO_LIMITS
    ) -> AsyncGenerator[AnyEvent, None]:
        """The events of a request, as sgld.engine.engine.Engine.generate gives them."""
        self.params.append(params)
        self.limits.append(limits)
        self.waited_s.append(waited_s)
        verb, _, rest = params.prompt.partition(" ")
        if verb == "refuse":
            raise _REFUSALS[rest]("it was refused")
        try:
            async with as_files(params, inputs):
                for index in range(params.num_outputs_per_prompt):
                    yield Queued(request_id="r1", output_index=index, position=index, eta_s=None)
                for index in range(params.num_outputs_per_prompt):
                    async for event in self._output(params.output(index), index, verb, rest, limits):
                        yield event
        finally:
            self.ended.append(params.prompt)
            self.has_ended.set()

    async def _output(
        self, params: SamplingParams, index: int, verb: str, rest: str, limits: Limits
    ) -> AsyncIterator[AnyEvent]:
        about: dict[str, Any] = {"request_id": "r1", "output_index": index}
        yield Started(**about)
        num_steps = params.num_inference_steps or 4
        for step in range(1, num_steps + 1):
            await anyio.lowlevel.checkpoint()
            yield Progress(**about, step=step, num_steps=num_steps, eta_s=None)
            if verb == "fail":
                yield Failed(**about, code=rest, message="it broke")
                return
            if verb == "break":
                raise RuntimeError("a bug")
            if verb == "hang":
                self.hanging.set()
                await anyio.sleep_forever()
            if verb == "wait":
                self.hanging.set()
                await self.go.wait()
            if step <= params.num_previews:
                yield Preview(**about, step=step, image=np.full((4, 6, 3), 10 * step, np.uint8))
                # Previews come with seconds between them.
                await anyio.wait_all_tasks_blocked()
                if verb == "show":
                    await self.go.wait()
        num_frames = {"nothing": 0, "layers": int(rest or 0) if verb == "layers" else 1}.get(verb, 1)
        asked = params.num_frames or (4 if limits.only_videos and verb != "picture" else 1)
        is_video = asked > 1
        num_frames = asked if is_video else num_frames
        frames = np.full((num_frames, params.height or 16, params.width or 24, 3), params.seed % 256, np.uint8)
        if is_video:
            yield Frames(**about, index=0, frames=frames[: num_frames // 2])
            if verb == "pause":
                self.hanging.set()
                await self.go.wait()
            yield Frames(**about, index=num_frames // 2, frames=frames[num_frames // 2 :])
        yield Completed(**about, frames=frames, seed=params.seed, fps=params.fps, elapsed_s=0.5, is_video=is_video)


_REFUSALS: dict[str, Callable[[str], errors.SgldError]] = {
    error.code: error for error in (errors.InvalidRequest, errors.QueueFull, errors.ModelError, errors.EngineClosed)
}


@dataclass(frozen=True)
class Running:
    """A server that runs in this event loop."""

    url: str
    services: Services
    engine: FakeEngine
    http: httpx2.AsyncClient

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def post(self, **fields: Any) -> httpx2.Response:
        """Ask for pictures."""
        return await self.http.post("/v1/images/generations", json=fields)


@asynccontextmanager
async def running(
    folder: Path,
    engine: FakeEngine | None = None,
    *,
    factory: EngineFactory | None = None,
    send_buffer_bytes: int | None = None,
    **settings: Any,
) -> AsyncIterator[Running]:
    """A real server on a port of its own, as long as the block lasts.

    :param factory: makes the engine, in the place of a fake one.
    :param send_buffer_bytes: of each connection, so that the server soon feels a client that doesn't read.
    """
    engine = engine or FakeEngine()
    settings = {"shutdown_timeout_s": 0.0, "data_dir": str(folder / "data"), **settings}
    listener = listen(ServerConfig(port=0, **settings))
    url = listener.url
    if send_buffer_bytes is not None:
        listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    async with AsyncExitStack() as stack:
        stack.enter_context(anyio.fail_after(TIMEOUT_S))
        tasks = await stack.enter_async_context(anyio.create_task_group())
        services: Services = await tasks.start(serve, CONFIG, listener, factory or engine)
        http = await stack.enter_async_context(httpx2.AsyncClient(base_url=url, timeout=TIMEOUT_S))
        try:
            yield Running(url, services, engine, http)
        finally:
            await http.aclose()
            services.stopping.set()
