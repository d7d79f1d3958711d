import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from blockbuster import blockbuster_ctx
from pipelines import build

from engine.streams import (
    TIMEOUT_S,
    completed,
    difference,
    ends_of,
    events_of,
    is_idle,
    leave_at,
    names,
    params_of,
    plain,
)
from sgld.config import ConditioningConfig, EngineConfig
from sgld.engine.engine import Engine
from sgld.errors import EngineClosed, InvalidRequest, QueueFull
from sgld.events import AnyEvent, Cancelled, Completed, Failed, Frames, Preview, Progress, Queued
from sgld.sampling_params import SamplingParams
from sgld.testing import InlineReplica

CONFIG = EngineConfig(device="cpu")
ORDER = re.compile("Queued Started ((Progress|Preview|Frames) )*Completed")
Pipeline = tuple[Any, dict[str, Any]]


@pytest.fixture(scope="module")
def pixart() -> Pipeline:
    return build("pixart")


@pytest.fixture(scope="module")
def wan() -> Pipeline:
    return build("wan")


@asynccontextmanager
async def serving(pipeline: Any, config: EngineConfig = CONFIG) -> AsyncIterator[Engine]:
    """An engine that serves a pipeline in a thread; it must be empty and its threads gone in the end."""
    async with Engine(config, rank_factory=InlineReplica(pipeline)) as engine:
        yield engine
        assert is_idle(engine)
    assert not threads_of("task-"), "threads of tasks are left"


def threads_of(prefix: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(prefix)]


@pytest.fixture
def rows(pixart: Pipeline) -> Iterator[list[int]]:
    """The number of rows of each forward of the transformer."""
    seen: list[int] = []

    def note(_module: Any, _args: Any, output: Any) -> None:
        seen.append(len(output[0]))

    handle = pixart[0].transformer.register_forward_hook(note)
    yield seen
    handle.remove()


@pytest.mark.parametrize("name", ["pixart", "sdxl", "flux", "qwen_image", "wan"])
async def test_lone_result_is_that_of_the_pipeline_bit_for_bit(name: str) -> None:
    pipeline, kwargs = build(name)
    params = params_of(kwargs, seed=7)
    expected = plain(pipeline, params)
    async with serving(pipeline) as engine:
        end = await completed(engine, params)
    assert end.frames.dtype == np.uint8
    assert end.seed == 7
    assert difference(end.frames, expected) == 0


async def test_events_come_in_the_documented_order(wan: Pipeline) -> None:
    pipeline, kwargs = wan
    async with serving(pipeline) as engine:
        events = await events_of(engine, params_of(kwargs, num_inference_steps=5, num_previews=2))
    assert ORDER.fullmatch(" ".join(names(events)))
    assert {(event.request_id, event.output_index) for event in events} == {(events[0].request_id, 0)}
    steps = [event.step for event in events if isinstance(event, Progress)]
    assert steps == sorted(set(steps))
    assert set(steps) <= set(range(1, 6))
    assert {event.num_steps for event in events if isinstance(event, Progress)} == {5}


async def test_outputs_have_their_own_seeds_and_events(pixart: Pipeline) -> None:
    pipeline, kwargs = pixart
    params = params_of(kwargs, seed=5, num_outputs_per_prompt=3)
    async with serving(pipeline) as engine:
        events = await events_of(engine, params)
    assert len({event.request_id for event in events}) == 1
    assert [event.position for event in events if isinstance(event, Queued)] == [0, 1, 2]
    ends = {event.output_index: event for event in events if isinstance(event, Completed)}
    assert {index: end.seed for index, end in ends.items()} == {0: 5, 1: 6, 2: 7}
    for index, end in ends.items():
        assert ORDER.fullmatch(" ".join(names([event for event in events if event.output_index == index])))
        assert difference(end.frames, plain(pipeline, params.output(index))) <= 1


async def test_requests_at_the_same_time_are_right_and_share_forwards(pixart: Pipeline, rows: list[int]) -> None:
    pipeline, kwargs = pixart
    requests = [
        params_of(kwargs, prompt="a dog on the moon", num_inference_steps=12, seed=1),
        params_of(kwargs, prompt="a red cat", num_inference_steps=10, seed=2, guidance_scale=2.0),
    ]
    expected = [plain(pipeline, params) for params in requests]
    single = max(rows)
    rows.clear()
    async with serving(pipeline) as engine:
        ends = await ends_of(engine, *requests)
    for end, picture in zip(ends, expected, strict=True):
        assert isinstance(end, Completed)
        assert difference(end.frames, picture) <= 1
    # Two forwards of several requests are made for the proof.
    assert sum(count > single for count in rows) > 2


async def test_calls_share_nothing_when_merging_is_off(pixart: Pipeline, rows: list[int]) -> None:
    pipeline, kwargs = pixart
    requests = [params_of(kwargs, seed=seed) for seed in (1, 2)]
    expected = [plain(pipeline, params) for params in requests]
    single = max(rows)
    rows.clear()
    async with serving(pipeline, EngineConfig(device="cpu", merge=False)) as engine:
        ends = await ends_of(engine, *requests)
    for end, picture in zip(ends, expected, strict=True):
        assert isinstance(end, Completed)
        assert difference(end.frames, picture) == 0
    assert rows == [single] * 6


@pytest.mark.parametrize(("size", "num_reused"), [(1.0, 1), (0.0, 0)])
async def test_text_that_was_encoded_before_is_not_encoded_again_unless_that_is_off(
    pixart: Pipeline, size: float, num_reused: int
) -> None:
    config = EngineConfig(device="cpu", conditioning=ConditioningConfig(conditioning_cache_size=size))
    params = params_of(pixart[1], num_inference_steps=1, guidance_scale=1.0)
    async with serving(pixart[0], config) as engine:
        frames = [(await completed(engine, params)).frames for _ in range(2)]
        encoders = [call for call in engine.statistics().calls if call.kind == "encode"]
    assert sum(call.num_reused for call in encoders) == num_reused
    assert difference(*frames) == 0


async def test_requests_over_the_limit_wait_for_their_turn(pixart: Pipeline) -> None:
    pipeline, kwargs = pixart
    requests = [params_of(kwargs, seed=seed) for seed in range(5)]
    async with serving(pipeline, EngineConfig(device="cpu", max_running_requests=2)) as engine:
        ends = await ends_of(engine, *requests)
    for end, params in zip(ends, requests, strict=True):
        assert isinstance(end, Completed)
        assert difference(end.frames, plain(pipeline, params)) <= 1


async def test_full_queue_refuses_a_request_and_serves_the_others(pixart: Pipeline) -> None:
    pipeline, kwargs = pixart
    config = EngineConfig(device="cpu", max_queued_requests=2, max_running_requests=1)
    async with serving(pipeline, config) as engine:
        with pytest.raises(QueueFull, match="limit of 2"):
            await events_of(engine, params_of(kwargs, num_outputs_per_prompt=4))
        events = await events_of(engine, params_of(kwargs, num_outputs_per_prompt=3))
    assert names(events).count("Completed") == 3


@pytest.mark.parametrize("name", ["pixart", "sdxl", "flux", "wan", "hunyuan_video_1_5"])
async def test_previews_are_small_pictures_of_the_steps_asked_for(name: str) -> None:
    pipeline, kwargs = build(name)
    params = params_of(kwargs, num_inference_steps=4, num_previews=3)
    async with serving(pipeline) as engine:
        # Of the first request's geometry the way from latents to pixels may have to be learned.
        end = await completed(engine, params)
        events = await events_of(engine, params)
    previews = [event for event in events if isinstance(event, Preview)]
    # A preview that the consumer didn't take in time gives way to the next one.
    assert 1 <= len(previews) <= 3
    assert {preview.step for preview in previews} <= {1, 2, 3}
    for preview in previews:
        height, width, channels = preview.image.shape
        assert preview.image.dtype == np.uint8
        assert channels == 3
        assert 1 <= height < end.frames.shape[1]
        assert 1 <= width < end.frames.shape[2]


async def test_no_previews_unless_asked_for(pixart: Pipeline) -> None:
    pipeline, kwargs = pixart
    async with serving(pipeline) as engine:
        assert "Preview" not in names(await events_of(engine, params_of(kwargs)))


async def test_previews_do_not_change_the_result(pixart: Pipeline) -> None:
    pipeline, kwargs = pixart
    async with serving(pipeline) as engine:
        end = await completed(engine, params_of(kwargs, num_previews=2))
    assert difference(end.frames, plain(pipeline, params_of(kwargs))) == 0


async def test_frames_arrive_while_they_are_decoded(wan: Pipeline) -> None:
    pipeline, kwargs = wan
    async with serving(pipeline) as engine:
        events = await events_of(engine, params_of(kwargs))
    pieces = [event for event in events if isinstance(event, Frames)]
    assert len(pieces) > 1
    assert [piece.index for piece in pieces] == [sum(len(p.frames) for p in pieces[:i]) for i in range(len(pieces))]
    end = events[-1]
    assert isinstance(end, Completed)
    assert difference(np.concatenate([piece.frames for piece in pieces]), end.frames) == 0


async def test_picture_is_not_sent_as_a_video(pixart: Pipeline) -> None:
    pipeline, kwargs = pixart
    async with serving(pipeline) as engine:
        events = await events_of(engine, params_of(kwargs))
    assert "Frames" not in names(events)
    assert isinstance(events[-1], Completed)
    assert events[-1].frames.shape == (1, 32, 32, 3)


async def test_eta_is_given_once_something_is_known_and_falls(pixart: Pipeline) -> None:
    pipeline, kwargs = pixart
    async with serving(pipeline) as engine:
        first = await events_of(engine, params_of(kwargs))
        assert isinstance(first[0], Queued)
        assert first[0].eta_s is None
        events = await events_of(engine, params_of(kwargs, num_inference_steps=9))
    assert isinstance(events[0], Queued)
    assert events[0].eta_s is not None
    etas = [event.eta_s for event in events if isinstance(event, Progress) and event.eta_s is not None]
    assert etas
    assert etas[-1] <= etas[0]


@pytest.mark.parametrize("num_events", range(1, 8))
async def test_leaving_the_iteration_frees_the_engine(pixart: Pipeline, num_events: int) -> None:
    pipeline, kwargs = pixart
    async with serving(pipeline) as engine:
        events = await leave_at(engine, params_of(kwargs, num_inference_steps=20, num_previews=9), num_events)
        assert len(events) == num_events
        assert is_idle(engine)
        following = params_of(kwargs, seed=3)
        assert difference((await completed(engine, following)).frames, plain(pipeline, following)) == 0
        # Commands are done in their order: the cancelled task ended before the following one.
        assert not threads_of(f"task-{events[0].request_id}-")


async def test_leaving_one_of_two_does_not_disturb_the_other(pixart: Pipeline) -> None:
    pipeline, kwargs = pixart
    params = params_of(kwargs, num_inference_steps=12, seed=3)
    ends: list[Completed] = []
    async with serving(pipeline) as engine:

        async def run() -> None:
            ends.append(await completed(engine, params))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await leave_at(engine, params_of(kwargs, num_inference_steps=50), 6)
    assert difference(ends[0].frames, plain(pipeline, params)) <= 1


async def test_leaving_cancels_all_outputs(pixart: Pipeline) -> None:
    pipeline, kwargs = pixart
    config = EngineConfig(device="cpu", max_running_requests=1)
    async with serving(pipeline, config) as engine:
        await leave_at(engine, params_of(kwargs, num_inference_steps=20, num_outputs_per_prompt=3), 5)
        assert is_idle(engine)
        assert names(await events_of(engine, params_of(kwargs)))[-1] == "Completed"


@pytest.mark.parametrize("kind", ["Queued", "Started", "Progress", "Preview", "Frames"])
async def test_cancelled_consumer_frees_the_engine(wan: Pipeline, kind: str) -> None:
    pipeline, kwargs = wan
    seen: list[AnyEvent] = []
    async with serving(pipeline) as engine:
        with anyio.fail_after(TIMEOUT_S), anyio.CancelScope() as scope:
            async for event in engine.generate(params_of(kwargs, num_inference_steps=4, num_previews=2)):
                seen.append(event)
                if type(event).__name__ == kind:
                    scope.cancel()
        assert kind in names(seen)
        assert is_idle(engine)
        following = params_of(kwargs, seed=3)
        assert difference((await completed(engine, following)).frames, plain(pipeline, following)) == 0


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"diffusers_kwargs": {"clean_captoin": True}}, "did you mean clean_caption?"),
        ({"diffusers_kwargs": {"generator": 1}}, "diffusers_kwargs.generator is set by sgld itself"),
        ({"diffusers_kwargs": {"height": 32}}, "give height itself instead"),
        ({"num_frames": 9}, "PixArtSigmaPipeline takes no num_frames"),
        ({"true_cfg_scale": 2.0}, "PixArtSigmaPipeline takes no true_cfg_scale"),
        ({"height": 33}, "divisible by 8"),
    ],
)
async def test_request_that_the_pipeline_cannot_do_is_invalid(
    pixart: Pipeline, choices: dict[str, Any], message: str
) -> None:
    pipeline, kwargs = pixart
    extra = {"clean_caption": False, "use_resolution_binning": False} | choices.pop("diffusers_kwargs", {})
    fields = {"height": 32, "width": 32} | choices
    async with serving(pipeline) as engine:
        events = await events_of(engine, SamplingParams(prompt="a cat", diffusers_kwargs=extra, **fields))
        assert isinstance(events[-1], Failed)
        assert events[-1].code == "invalid_request"
        assert message in events[-1].message
        assert names(await events_of(engine, params_of(kwargs)))[-1] == "Completed"


async def test_missing_image_is_refused_before_the_request_waits(pixart: Pipeline) -> None:
    pipeline, kwargs = pixart
    async with serving(pipeline) as engine:
        with pytest.raises(InvalidRequest, match="no image"):
            await events_of(engine, params_of(kwargs, image_path=("/nowhere/at/all.png",)))


async def test_image_pipeline_takes_one_frame_for_a_picture(pixart: Pipeline) -> None:
    pipeline, kwargs = pixart
    async with serving(pipeline) as engine:
        assert names(await events_of(engine, params_of(kwargs, num_frames=1)))[-1] == "Completed"


@pytest.mark.parametrize(
    "choices",
    [{"prompt": "cat " * 40_000}, {"diffusers_kwargs": {"a": [0.5] * 40_000}}, {"diffusers_kwargs": {"a": object()}}],
)
async def test_request_that_fits_into_no_message_is_invalid(pixart: Pipeline, choices: dict[str, Any]) -> None:
    pipeline, kwargs = pixart
    async with serving(pipeline) as engine:
        with pytest.raises(InvalidRequest):
            await events_of(engine, SamplingParams(**choices))
        assert names(await events_of(engine, params_of(kwargs)))[-1] == "Completed"


@pytest.fixture
def cursed(pixart: Pipeline) -> Iterator[Callable[[BaseException], None]]:
    """Makes the transformer raise something, in the middle of each picture of the moon."""
    pipeline = pixart[0]
    moon = pipeline.tokenizer.convert_tokens_to_ids("moon")
    curse: list[BaseException] = []

    def mark(_module: Any, args: Any, output: Any) -> None:
        output[0][(args[0] == moon).any(dim=1)] = 1e3

    def raise_if_marked(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        embeds = kwargs["encoder_hidden_states"]
        is_marked = (embeds == 1e3).flatten(1).all(dim=1)
        if curse and (is_marked & (kwargs["timestep"] < 600)).any():
            raise curse[0]

    handles = [
        pipeline.text_encoder.register_forward_hook(mark),
        pipeline.transformer.register_forward_pre_hook(raise_if_marked, with_kwargs=True),
    ]
    yield curse.append
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("the moon is down"), "pipeline_failed"),
        (ValueError("the moon is down"), "pipeline_failed"),
        (torch.OutOfMemoryError("the moon is too large"), "out_of_memory"),
        (RuntimeError("the moon is down " * 10_000), "pipeline_failed"),
    ],
    ids=["error", "value", "memory", "long"],
)
async def test_request_that_raises_in_the_middle_fails_alone(
    pixart: Pipeline, cursed: Callable[[BaseException], None], error: BaseException, code: str
) -> None:
    pipeline, kwargs = pixart
    cursed(error)
    good = [params_of(kwargs, num_inference_steps=10, seed=seed) for seed in (1, 2)]
    bad = params_of(kwargs, num_inference_steps=10, prompt="a dog on the moon")
    async with serving(pipeline) as engine:
        first, failed, second = await ends_of(engine, good[0], bad, good[1])
        assert isinstance(failed, Failed)
        assert failed.code == code
        assert "moon" in failed.message or "memory" in failed.message
        for end, params in zip((first, second), good, strict=True):
            assert isinstance(end, Completed)
            assert difference(end.frames, plain(pipeline, params)) <= 1
        assert names(await events_of(engine, good[0]))[-1] == "Completed"


async def test_engine_serves_only_while_it_is_open(pixart: Pipeline) -> None:
    pipeline, kwargs = pixart
    engine = Engine(CONFIG, rank_factory=InlineReplica(pipeline))
    with pytest.raises(EngineClosed):
        await events_of(engine, params_of(kwargs))
    async with engine:
        assert (await engine.ready()).pipeline_class == "PixArtSigmaPipeline"
        assert names(await events_of(engine, params_of(kwargs)))[-1] == "Completed"
    with pytest.raises(EngineClosed):
        await events_of(engine, params_of(kwargs))


async def test_closing_cancels_what_runs_and_what_waits(pixart: Pipeline) -> None:
    pipeline, kwargs = pixart
    ends: list[AnyEvent] = []
    has_begun = anyio.Event()

    async def run(engine: Engine, seed: int) -> None:
        async for event in engine.generate(params_of(kwargs, num_inference_steps=200, seed=seed)):
            if isinstance(event, Progress):
                has_begun.set()
            if isinstance(event, Completed | Failed | Cancelled):
                ends.append(event)

    with anyio.fail_after(TIMEOUT_S):
        async with (
            anyio.create_task_group() as tasks,
            Engine(EngineConfig(device="cpu", max_running_requests=2), rank_factory=InlineReplica(pipeline)) as engine,
        ):
            for seed in range(4):
                tasks.start_soon(run, engine, seed)
            await has_begun.wait()
    assert names(ends) == ["Cancelled"] * 4
    assert not threads_of("task-")
    assert not threads_of("inline-rank")


async def test_closing_wakes_those_who_wait_for_the_model() -> None:
    outcomes: list[BaseException] = []
    is_loading = anyio.Event()

    @asynccontextmanager
    async def never_ready(_config: EngineConfig, _replica: int) -> AsyncIterator[Any]:
        is_loading.set()
        await anyio.sleep_forever()
        yield

    async def wait(engine: Engine) -> None:
        try:
            await engine.ready()
        except EngineClosed as error:
            outcomes.append(error)

    with anyio.fail_after(TIMEOUT_S):
        async with anyio.create_task_group() as tasks, Engine(CONFIG, rank_factory=never_ready) as engine:
            tasks.start_soon(wait, engine)
            await is_loading.wait()
            await anyio.wait_all_tasks_blocked()
    assert len(outcomes) == 1


async def test_event_loop_is_never_blocked(wan: Pipeline) -> None:
    """Neither by waiting nor by computing; how long it waits for a core says nothing."""
    pipeline, kwargs = wan
    slowest_s = 0.0

    async def watch() -> None:
        nonlocal slowest_s
        while True:
            before = time.thread_time()
            await anyio.lowlevel.checkpoint()
            slowest_s = max(slowest_s, time.thread_time() - before)

    with blockbuster_ctx():
        async with serving(pipeline) as engine, anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            requests = [params_of(kwargs, num_previews=2, seed=seed) for seed in range(3)]
            assert names(list(await ends_of(engine, *requests))) == ["Completed"] * 3
            await leave_at(engine, requests[0], 4)
            tasks.cancel_scope.cancel()
    assert slowest_s < 2
