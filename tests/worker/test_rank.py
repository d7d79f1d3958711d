"""What a rank does with components that are offloaded or compiled, up to what its front hears."""

import asyncio
import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from engine.streams import completed, difference, events_of, params_of, plain
from pipelines import build

from sgld.config import EngineConfig, MemoryConfig
from sgld.engine.engine import Engine
from sgld.events import Completed, Preview, Progress
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

CONFIG = EngineConfig(device="cpu", merge=False)


class Replica(InlineReplica):
    """Serves a pipeline some of whose components are offloaded or compiled."""

    def __init__(self, pipeline: Any, **changed: Any) -> None:
        super().__init__(pipeline)
        self._changed = changed

    def _model(self, config: EngineConfig) -> LoadedModel:
        return dataclasses.replace(super()._model(config), **self._changed)


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
    monkeypatch.setattr("sgld.worker.swap.run_job", lambda job: read.set())
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
