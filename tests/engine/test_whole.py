"""Pipelines that run whole, through the engine."""

from typing import Any

import anyio
import numpy as np
import pytest
from diffusers import StableDiffusionAttendAndExcitePipeline
from pipelines import build

from engine.streams import completed, difference, ends_of, events_of, is_idle, leave_at, names, params_of, plain
from sgld.config import EngineConfig
from sgld.engine.engine import Engine
from sgld.events import Completed, Failed, Frames, Preview, Progress, Queued, Started
from sgld.sampling_params import TaylorCache
from sgld.testing import InlineReplica

WHOLE = EngineConfig(device="cpu", backend="diffusers")


@pytest.mark.parametrize("name", ["flux", "sd_pag"])
async def test_requests_run_one_after_the_other_and_right(name: str) -> None:
    pipeline, kwargs = build(name)
    requests = [params_of(kwargs, seed=seed) for seed in range(3)]
    expected = [plain(pipeline, params) for params in requests]
    async with Engine(WHOLE, rank_factory=InlineReplica(pipeline)) as engine:
        await engine.ready()
        ends = await ends_of(engine, *requests)
        statistics = engine.statistics()
    for end, pixels in zip(ends, expected, strict=True):
        assert isinstance(end, Completed)
        assert difference(end.frames, pixels) == 0
    assert {call.num_merged for call in statistics.calls} == {0}


async def test_second_request_waits_in_the_queue_and_knows_when() -> None:
    pipeline, kwargs = build("flux")
    async with Engine(WHOLE, rank_factory=InlineReplica(pipeline)) as engine:
        await completed(engine, params_of(kwargs))
        order: list[tuple[str, str]] = []

        async def run(name: str) -> None:
            async for event in engine.generate(params_of(kwargs, num_inference_steps=8)):
                order.append((name, type(event).__name__))
                if isinstance(event, Queued):
                    assert event.eta_s is not None

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, "a")
            tasks.start_soon(run, "b")
    first, second = (order.index((name, "Started")) for name in "ab")
    last, ended = ("b", "a") if first < second else ("a", "b")
    assert order.index((last, "Progress")) > order.index((ended, "Completed"))


async def test_progress_previews_and_frames_come_on_the_way() -> None:
    pipeline, kwargs = build("wan")
    params = params_of(kwargs, num_inference_steps=4, num_previews=2)
    expected = plain(pipeline, params)
    async with Engine(WHOLE, rank_factory=InlineReplica(pipeline)) as engine:
        events = await events_of(engine, params)
        events_again = await events_of(engine, params)
    assert [e.step for e in events if isinstance(e, Progress)][-1] == 4
    for told in (events, events_again):
        # Who reads late gets only the latest preview.
        assert [event.step for event in told if isinstance(event, Preview)] in ([1, 3], [3])
        frames = [event for event in told if isinstance(event, Frames)]
        assert len(frames) > 1, names(told)
        assert difference(np.concatenate([event.frames for event in frames]), expected) == 0
        end = told[-1]
        assert isinstance(end, Completed)
        assert difference(end.frames, expected) == 0


async def test_who_leaves_frees_the_engine_at_the_next_step() -> None:
    pipeline, kwargs = build("flux")
    params = params_of(kwargs, num_inference_steps=1000)
    async with Engine(WHOLE, rank_factory=InlineReplica(pipeline)) as engine:
        events = await leave_at(engine, params, 4)
        assert any(isinstance(event, Started) for event in events)
        assert is_idle(engine)
        assert difference((await completed(engine, params_of(kwargs))).frames, plain(pipeline, params_of(kwargs))) == 0


async def test_step_cache_of_the_engine_is_refused() -> None:
    pipeline, kwargs = build("flux")
    async with Engine(WHOLE, rank_factory=InlineReplica(pipeline)) as engine:
        end = (await events_of(engine, params_of(kwargs, cache=TaylorCache())))[-1]
    assert isinstance(end, Failed)
    assert (end.code, end.message[:5]) == ("invalid_request", "cache")


async def test_error_is_told_as_that_of_the_request() -> None:
    pipeline, kwargs = build("flux")
    wrong: dict[str, Any] = {"callback_on_step_end_tensor_inputs": ["nothing"]}
    async with Engine(WHOLE, rank_factory=InlineReplica(pipeline)) as engine:
        end = (await events_of(engine, params_of(kwargs | wrong)))[-1]
    assert isinstance(end, Failed)
    assert end.code == "invalid_request"


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # of that pipeline
async def test_pipeline_that_needs_gradients_runs_whole_by_itself() -> None:
    made, kwargs = build("sd")
    parts = {name: part for name, part in made.components.items() if name != "image_encoder"}
    pipeline = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    own = {"token_indices": [1, 2], "max_iter_to_alter": 2, "attn_res": [8, 8], "thresholds": {}}
    params = params_of(kwargs | own)
    async with Engine(EngineConfig(device="cpu"), rank_factory=InlineReplica(pipeline)) as engine:
        end = await completed(engine, params)
        assert (await engine.ready()).is_whole
    assert difference(end.frames, plain(pipeline, params)) == 0
    async with Engine(EngineConfig(device="cpu", backend="sglang"), rank_factory=InlineReplica(pipeline)) as engine:
        refused = (await events_of(engine, params))[-1]
    assert isinstance(refused, Failed)
    assert "it can be served with --backend diffusers" in refused.message
