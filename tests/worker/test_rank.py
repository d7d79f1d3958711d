"""What a rank does with components that are offloaded or compiled, up to what its front hears."""

import asyncio
import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from diffusers import DiffusionPipeline
from engine.streams import completed, difference, events_of, params_of, plain
from pipelines import build
from torch import nn

from sgld.config import EngineConfig, MemoryConfig
from sgld.engine.engine import Engine
from sgld.events import Completed, Preview, Progress, Started
from sgld.messages import AnyReply, Judged, Stepped
from sgld.models.load import LoadedModel
from sgld.models.performance import Compilation
from sgld.models.placement import regions
from sgld.models.resolve import EMBEDDED
from sgld.sampling_params import SamplingParams
from sgld.testing import InlineReplica
from sgld.worker.aside import Known
from sgld.worker.clock import DeviceClock
from sgld.worker.compiler import CompileJob, TorchState
from sgld.worker.sketch import sketched
from worker.devices import LateEvent
from worker.requests import Doubling

CONFIG = EngineConfig(device="cpu", merge=False)


class Replica(InlineReplica):
    """Serves a pipeline some of whose components are offloaded or compiled."""

    def __init__(self, pipeline: Any, **changed: Any) -> None:
        super().__init__(pipeline)
        self._changed = changed

    def _model(self, config: EngineConfig) -> LoadedModel:
        return dataclasses.replace(super()._model(config), **self._changed)


class Steps(DiffusionPipeline):  # type: ignore[misc]
    """A pipeline that does nothing but steps; before each it says whose it is and which."""

    before_step: Callable[[Any, str, int], None]

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)

    @torch.no_grad()
    def __call__(self, prompt: str, num_inference_steps: int, output_type: str = "pt") -> tuple[torch.Tensor]:
        sample = torch.zeros(1, 3, 8, 8)
        with self.progress_bar(total=num_inference_steps) as bar:
            for step in range(num_inference_steps):
                self.before_step(self, prompt, step)
                sample = self.transformer(sample)
                bar.update()
        return (sample,)


def stepping(before_step: Callable[[Any, str, int], None]) -> InlineReplica:
    pipeline = Steps(Doubling())
    pipeline.before_step = before_step
    return InlineReplica(pipeline)


def asked(prompt: str, num_steps: int) -> SamplingParams:
    return SamplingParams(prompt=prompt, num_inference_steps=num_steps)


async def test_newcomer_waits_for_no_more_than_the_tick_that_runs() -> None:
    begun: list[str] = []
    is_there, may_go_on = threading.Event(), threading.Event()

    def before_step(_pipeline: Any, prompt: str, step: int) -> None:
        begun.append(prompt)
        if (prompt, step) == ("long", 5):
            is_there.set()
            assert may_go_on.wait(30)

    async with Engine(CONFIG, rank_factory=stepping(before_step)) as engine:
        # Without knowing what a step takes there are no standing orders.
        await completed(engine, asked("first", 2))
        long = asyncio.create_task(completed(engine, asked("long", 30)))
        assert await asyncio.to_thread(is_there.wait, 30)
        async for event in engine.generate(asked("newcomer", 1)):
            if isinstance(event, Started):
                may_go_on.set()
        await long
    assert begun == ["first"] * 2 + ["long"] * 6 + ["newcomer"] + ["long"] * 24


async def test_front_hears_while_an_order_stands_that_a_request_turned_out_to_be_exclusive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def before_step(pipeline: Any, _prompt: str, step: int) -> None:
        if step == 5:
            pipeline.transformer.mark = "changed"

    replies: list[AnyReply] = []
    async with Engine(CONFIG, rank_factory=stepping(before_step)) as engine:
        handle = engine._supervisor.handle

        async def heard(replica: Any, rank: Any, reply: AnyReply) -> None:
            replies.append(reply)
            await handle(replica, rank, reply)

        monkeypatch.setattr(engine._supervisor, "handle", heard)
        await completed(engine, asked("first", 2))
        await completed(engine, asked("a", 30))
    news = next(
        n for n, reply in enumerate(replies) if isinstance(reply, Judged) and "exclusive" in reply.modes.values()
    )
    steps = [reply.step for reply in replies[:news] if isinstance(reply, Stepped)]
    assert steps == [1, 2, *range(1, 6)]


async def test_offloaded_components_make_the_same_pictures_and_previews() -> None:
    pipeline, kwargs = build("pixart")
    params = params_of(kwargs, num_previews=1)
    expected = plain(pipeline, params)
    replica = Replica(pipeline, offloaded=("text_encoder", "transformer", "vae"))
    async with Engine(CONFIG, rank_factory=replica) as engine:
        events = await events_of(engine, params)
    assert any(isinstance(event, Preview) for event in events)
    assert isinstance(events[-1], Completed)
    assert difference(events[-1].frames, expected) == 0


@pytest.mark.parametrize("num_outputs", [1, 2])
async def test_rank_that_is_ahead_of_its_device_makes_the_same_pictures(
    num_outputs: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sgld.worker.rank.device_clock", lambda _: DeviceClock(LateEvent, lambda: None))
    pipeline, kwargs = build("pixart")
    params = params_of(kwargs, num_outputs_per_prompt=num_outputs, num_previews=1)
    trace = tmp_path / "trace.json"
    config = msgspec.structs.replace(CONFIG, trace=str(trace), merge=True)
    async with Engine(config, rank_factory=InlineReplica(pipeline)) as engine:
        events = await events_of(engine, params)
    for index, event in enumerate(event for event in events if isinstance(event, Completed)):
        assert difference(event.frames, plain(pipeline, params.output(index))) <= 1
    steps = [event.step for event in events if isinstance(event, Progress) and event.output_index == 0]
    assert steps[-1:] == [3]
    spans = [event for event in json.loads(trace.read_text()) if event["name"] == "transformer.forward"]
    assert sum(len(span["args"]["calls"]) for span in spans) == 3 * num_outputs
    assert all(span["dur"] >= 0 for span in spans)


async def test_front_hears_that_a_component_is_not_compiled() -> None:
    def refuse(_graph: Any, _inputs: Any) -> Any:
        raise NotImplementedError("no compiler here")

    pipeline, kwargs = build("pixart")
    pipeline.transformer.compile(backend=refuse)
    async with Engine(CONFIG, rank_factory=Replica(pipeline, compiled=("transformer",))) as engine:
        await engine.ready()
        assert engine.model is not None
        assert engine.model.decisions == {}
        await completed(engine, params_of(kwargs))
        assert engine.model.decisions["transformer"].startswith("not compiled: ")
        assert "no compiler here" in engine.model.decisions["transformer"]
    torch._dynamo.reset()


async def test_rank_without_requests_reads_what_was_compiled_before_an_earlier_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = threading.Event()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("sgld.worker.builder.run_job", lambda job: read.set())
    pipeline, _ = build("pixart")
    known = Known(tmp_path)
    known.add(CompileJob(sketched(regions(pipeline.transformer)[0]), b"", TorchState.now()))
    known.add_modules(["json"])
    replica = Replica(pipeline, compiled=("transformer",), compilation=Compilation(is_aside=True))
    async with Engine(CONFIG, rank_factory=replica) as engine:
        await engine.ready()
        assert await asyncio.to_thread(read.wait, 30)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("by_layers", [False, True])
async def test_offload_from_a_gpu_changes_no_picture(by_layers: bool) -> None:
    pictures = []
    offload = MemoryConfig(
        text_encoder_cpu_offload=True,
        dit_cpu_offload=not by_layers,
        dit_layerwise_offload=by_layers,
        vae_cpu_offload=True,
    )
    for memory in (MemoryConfig(), offload):
        config = EngineConfig(model_path=str(EMBEDDED["sgld/tiny-image"]), device="cuda", memory=memory)
        async with Engine(config, rank_factory=InlineReplica(None)) as engine:
            params = SamplingParams(prompt="a red circle", num_inference_steps=4, num_outputs_per_prompt=2)
            events = await events_of(engine, params)
            pictures.append([event.frames for event in events if isinstance(event, Completed)])
    for one, other in zip(*pictures, strict=True):
        assert abs(one.astype(int) - other.astype(int)).max() <= 1
