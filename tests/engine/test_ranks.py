"""Replicas of several ranks, as real processes on the CPU: they make what one makes, and leave nothing behind."""

import json
import multiprocessing
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, TypeVar

import anyio
import msgspec
import pytest
import torch
from anyio.from_thread import BlockingPortal, start_blocking_portal
from peft import LoraConfig, get_peft_model_state_dict
from pipelines import build

from engine.preloaded import preloaded_rank
from engine.streams import (
    TIMEOUT_S,
    completed,
    difference,
    ends_of,
    events_of,
    events_with_fault,
    leave_at,
    params_of,
    plain,
)
from sgld.config import EngineConfig
from sgld.engine.engine import Engine
from sgld.engine.replica import rank_process
from sgld.events import Completed, Failed, Progress, Restarted
from sgld.parallel import ParallelConfig
from sgld.sampling_params import FirstBlockCache, LoraChoice, SamplingParams

pytestmark = pytest.mark.long
T = TypeVar("T")


@dataclass(frozen=True)
class Served:
    """An engine whose ranks are ready, on an event loop in a thread: starting one takes seconds, so tests share it."""

    portal: BlockingPortal
    engine: Engine
    pipeline: Any
    kwargs: dict[str, Any]
    folder: Path
    others: frozenset[int]
    """Processes of other engines."""

    def run(self, body: Callable[[Engine], Awaitable[T]]) -> T:
        return self.portal.call(body, self.engine)

    def params(self, **choices: Any) -> SamplingParams:
        return params_of(self.kwargs, **choices)

    def decision(self, about: str) -> str:
        """What was decided of a component, or of the model."""
        model = self.engine.model
        assert model is not None
        return model.decisions[about]

    def completed(self, params: SamplingParams) -> Completed:
        return self.portal.call(completed, self.engine, params)


@contextmanager
def serving(
    name: str, folder: Path, trace: Path | None = None, device: Literal["cpu", "cuda"] = "cpu", **parallel: Any
) -> Iterator[Served]:
    others = frozenset(process.pid for process in multiprocessing.active_children() if process.pid)
    pipeline, kwargs = build(name)
    if hasattr(pipeline, "vae") and hasattr(pipeline.vae, "tile_sample_min_size"):
        # Small enough for several tiles of a small picture.
        pipeline.vae.register_to_config(sample_size=16)
    pipeline.save_pretrained(folder)
    pipeline = type(pipeline).from_pretrained(folder)
    # As several ranks have it.
    pipeline.vae.enable_tiling()
    config = EngineConfig(
        model_path=str(folder),
        device=device,
        num_cpu_threads=1,
        trace=str(trace) if trace is not None else None,
        parallel=ParallelConfig(**parallel),
    )
    # What forks from a process that looked for GPUs can't use them.
    factory = preloaded_rank if device == "cpu" else rank_process
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(Engine(config, rank_factory=factory)) as engine,
    ):
        portal.call(engine.ready)
        yield Served(portal, engine, pipeline, kwargs, folder, others)


@pytest.fixture(scope="module")
def shared_tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving("flux", tmp_path_factory.mktemp("flux"), num_gpus=2) as served:
        yield served


@pytest.fixture(scope="module")
def shared_rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving("wan", tmp_path_factory.mktemp("wan"), enable_cfg_parallel=True) as served:
        yield served


@pytest.fixture(scope="module")
def shared_layers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving("flux", tmp_path_factory.mktemp("flux"), tp_size=2) as served:
        yield served


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving("flux", tmp_path_factory.mktemp("elastic"), num_gpus=2, elastic_sp=True) as served:
        yield served


def pids(others: frozenset[int] = frozenset()) -> dict[int, int]:
    """The processes of ranks that there are, by rank.

    :param others: those of other engines.
    """
    processes = [process for process in multiprocessing.active_children() if process.pid not in others]
    names = {process.name: process.pid for process in processes if process.pid}
    return {int(name.rpartition("-")[2]): pid for name, pid in names.items() if name.startswith("sgld-rank-")}


def test_tokens_are_shared_by_ulysses(shared_tokens: Served) -> None:
    params = shared_tokens.params(seed=3, num_inference_steps=4)
    assert difference(shared_tokens.completed(params).frames, plain(shared_tokens.pipeline, params)) <= 1
    assert "2 = dp 1 x cfg 1 x sp 2 (ulysses 2 x ring 1) x tp 1" in shared_tokens.decision("model")


def test_requests_of_other_sizes_and_lengths_share_them_too(shared_tokens: Served) -> None:
    """Of one the tokens can't be split evenly; two share forwards."""
    requests = [
        shared_tokens.params(seed=1, height=24, width=40, num_inference_steps=3),
        shared_tokens.params(seed=2, num_inference_steps=5),
        shared_tokens.params(seed=4, num_inference_steps=6),
    ]
    ends = shared_tokens.portal.call(ends_of, shared_tokens.engine, *requests)
    for end, params in zip(ends, requests, strict=True):
        assert isinstance(end, Completed), end
        assert difference(end.frames, plain(shared_tokens.pipeline, params)) <= 1


def test_followers_have_the_adapters_of_requests(shared_tokens: Served, tmp_path: Path) -> None:
    assert_has_adapters(shared_tokens, tmp_path)


def assert_has_adapters(served: Served, folder: Path) -> None:
    pipeline = type(served.pipeline).from_pretrained(served.folder)
    targets = ["to_q", "to_k", "to_out.0", "proj_out"]
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    layers = get_peft_model_state_dict(pipeline.transformer)
    pipeline.save_lora_weights(folder / "lora", transformer_lora_layers=layers)
    adapted = served.params(seed=5, lora=(LoraChoice(path=str(folder / "lora")),))
    without = served.params(seed=5)
    assert difference(plain(pipeline, without), plain(served.pipeline, without)) > 10
    ends = served.portal.call(ends_of, served.engine, adapted, without)
    for end, right in zip(ends, (plain(pipeline, without), plain(served.pipeline, without)), strict=True):
        assert isinstance(end, Completed), end
        assert difference(end.frames, right) <= 1


def test_tiles_of_a_picture_are_shared(shared_tokens: Served) -> None:
    """The second picture is decoded with known shapes, so that each rank computes some tiles only."""
    for seed in (6, 7):
        params = shared_tokens.params(seed=seed, height=64, width=64, num_inference_steps=1)
        assert difference(shared_tokens.completed(params).frames, plain(shared_tokens.pipeline, params)) <= 1


def test_error_that_all_ranks_raise_fails_one_request_only(shared_tokens: Served) -> None:
    """One token of text can't be split in two."""
    before = pids()
    params = shared_tokens.params(num_inference_steps=2)
    few = {**params.diffusers_kwargs, "max_sequence_length": 1}
    params = msgspec.structs.replace(params, diffusers_kwargs=few)
    [*_, end] = shared_tokens.portal.call(events_of, shared_tokens.engine, params)
    assert isinstance(end, Failed), end
    assert end.code != "rank_lost"
    after = shared_tokens.params(seed=8)
    assert difference(shared_tokens.completed(after).frames, plain(shared_tokens.pipeline, after)) <= 1
    assert pids() == before


def test_cache_that_exchanges_blocks_is_refused(shared_tokens: Served) -> None:
    params = shared_tokens.params(cache=FirstBlockCache())
    [*_, end] = shared_tokens.portal.call(events_of, shared_tokens.engine, params)
    assert isinstance(end, Failed)
    assert "single GPU" in end.message


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_request_runs_again_when_a_follower_is_lost(shared_tokens: Served, number: signal.Signals) -> None:
    params = shared_tokens.params(num_inference_steps=30, seed=3)
    before = pids()

    fault = partial(os.kill, before[1], number)
    events = shared_tokens.portal.call(events_with_fault, shared_tokens.engine, params, fault)
    assert sum(isinstance(event, Restarted) for event in events) == 1
    assert isinstance(events[-1], Completed)
    assert difference(events[-1].frames, plain(shared_tokens.pipeline, params)) <= 1
    assert set(pids().values()).isdisjoint(before.values())
    assert not any(Path(f"/proc/{pid}").exists() for pid in before.values())


def test_halves_of_guidance_are_shared(shared_rows: Served) -> None:
    params = shared_rows.params(seed=3, num_inference_steps=5)
    for _ in range(2):
        assert difference(shared_rows.completed(params).frames, plain(shared_rows.pipeline, params)) <= 1
    assert "rows of its calls are shared by 2 groups of ranks" in shared_rows.decision("transformer")


def test_rows_that_are_not_what_they_seem_are_not_shared(tmp_path: Path) -> None:
    """Z-Image has lists of latents, whose channels look like rows to who has seen one request only."""
    with serving("z_image", tmp_path, enable_cfg_parallel=True) as served:
        params = served.params(seed=3, num_inference_steps=3)
        for _ in range(2):
            assert difference(served.completed(params).frames, plain(served.pipeline, params)) <= 1
        assert "rows of its calls can't be shared" in served.decision("transformer")
        assert served.engine.statistics().num_restarts == 0


def test_each_rank_has_parts_of_layers(shared_layers: Served) -> None:
    requests = [shared_layers.params(seed=seed, num_inference_steps=seed) for seed in (3, 4)]
    ends = shared_layers.portal.call(ends_of, shared_layers.engine, *requests)
    for end, params in zip(ends, requests, strict=True):
        assert isinstance(end, Completed), end
        assert difference(end.frames, plain(shared_layers.pipeline, params)) <= 1
    assert "2 = dp 1 x cfg 1 x sp 1 (ulysses 1 x ring 1) x tp 2" in shared_layers.decision("model")
    for name in ("text_encoder", "text_encoder_2", "transformer"):
        assert "each of 2 ranks has parts of its layers" in shared_layers.decision(name)


def test_parts_of_layers_have_the_adapters_of_requests(shared_layers: Served, tmp_path: Path) -> None:
    assert_has_adapters(shared_layers, tmp_path)


def test_each_forward_has_ranks_of_its_own_and_company_changes_nothing(tmp_path: Path) -> None:
    """Four ranks: the trace shows which ran what, and that some did so at the same time."""
    trace = tmp_path / "trace.json"
    with serving("flux", tmp_path / "flux", trace, num_gpus=4, elastic_sp=True) as served:
        sizes: list[dict[str, int]] = [{}, {"height": 24, "width": 40}]
        requests = [served.params(seed=n, num_inference_steps=4 + n, **sizes[n % 2]) for n in range(6)]
        ends = served.portal.call(ends_of, served.engine, *requests)
        for end, params in zip(ends, requests, strict=True):
            assert isinstance(end, Completed), end
            assert difference(end.frames, plain(served.pipeline, params)) <= 1
        assert "sp 1 or 2 or 4 (elastic)" in served.decision("model")
    events = json.loads(trace.read_text())
    ticks = [event for event in events if event["ph"] == "X" and event["pid"] == 1]
    assert len({tick["tid"] for tick in ticks if tick["name"].startswith("transformer")}) == 4
    apart = [(one, other) for one, other in combinations(ticks, 2) if one["args"]["tick"] != other["args"]["tick"]]
    assert any(one["ts"] < other["ts"] + other["dur"] and other["ts"] < one["ts"] + one["dur"] for one, other in apart)


def test_ranks_that_choose_for_each_forward_have_the_adapters_of_requests(elastic: Served, tmp_path: Path) -> None:
    pipeline = type(elastic.pipeline).from_pretrained(elastic.folder)
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipeline.transformer)
    pipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    without = [elastic.params(seed=n, num_inference_steps=6) for n in range(3)]
    adapted = [
        msgspec.structs.replace(params, lora=(LoraChoice(path=str(tmp_path / "lora")),)) for params in without[:2]
    ]
    every = [*without, *adapted]
    ends = elastic.portal.call(ends_of, elastic.engine, *every)
    rights = [plain(elastic.pipeline, p) for p in without] + [plain(pipeline, p) for p in without[:2]]
    for end, right in zip(ends, rights, strict=True):
        assert isinstance(end, Completed), end
        assert difference(end.frames, right) <= 1


def test_what_several_ranks_can_not_share_one_of_them_runs(elastic: Served) -> None:
    """One token of text can't be split in two."""
    params = elastic.params(num_inference_steps=12, max_sequence_length=1)
    assert difference(elastic.completed(params).frames, plain(elastic.pipeline, params)) <= 1
    assert "some calls run on one rank each" in elastic.decision("transformer")


def test_forward_that_fails_ends_its_own_request_only_and_cancelled_ones_leave(elastic: Served) -> None:
    before = pids(elastic.others)
    good = [elastic.params(seed=n, num_inference_steps=10) for n in range(2)]
    broken = elastic.params(seed=7)
    failing = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [1]}}
    broken = msgspec.structs.replace(broken, diffusers_kwargs={**broken.diffusers_kwargs, **failing})
    ends: list[Any] = []

    async def body(engine: Engine) -> None:
        async def leaving() -> None:
            await leave_at(engine, elastic.params(seed=9, num_inference_steps=60), 6)

        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(leaving)
            ends.extend(await ends_of(engine, *good, broken, broken))

    elastic.run(body)
    for end, params in zip(ends, good, strict=False):
        assert isinstance(end, Completed), end
        assert difference(end.frames, plain(elastic.pipeline, params)) <= 1
    for end in ends[2:]:
        assert isinstance(end, Failed)
        assert (end.code, "encoder_hid_proj" in end.message) == ("pipeline_failed", True)
    assert pids(elastic.others) == before


def test_requests_run_again_when_a_rank_dies_that_runs_one_of_them(elastic: Served) -> None:
    requests = [elastic.params(num_inference_steps=30, seed=seed) for seed in range(3)]
    before = pids(elastic.others)

    async def body(engine: Engine) -> list[Any]:
        async def kill() -> None:
            async for event in engine.generate(elastic.params(num_inference_steps=30)):
                if isinstance(event, Progress):
                    os.kill(pids(elastic.others)[1], signal.SIGKILL)
                    return

        ends: list[Any] = []
        with anyio.fail_after(TIMEOUT_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(kill)
                ends += await ends_of(engine, *requests)
        return ends

    for end, params in zip(elastic.run(body), requests, strict=True):
        assert isinstance(end, Completed), end
        assert difference(end.frames, plain(elastic.pipeline, params)) <= 1
    assert set(pids(elastic.others).values()).isdisjoint(before.values())


@pytest.mark.gpu
def test_on_gpus_a_request_runs_again_when_a_follower_is_lost(tmp_path: Path) -> None:
    """The others wait on their GPUs for what it would write."""
    if torch.cuda.device_count() < 2:
        pytest.skip("it needs two GPUs")
    with serving("flux", tmp_path / "flux", device="cuda", num_gpus=2) as served:
        params = served.params(seed=3, num_inference_steps=60)
        right = served.completed(params).frames
        before = pids(served.others)
        fault = partial(os.kill, before[1], signal.SIGKILL)
        events = served.portal.call(events_with_fault, served.engine, params, fault)
        assert sum(isinstance(event, Restarted) for event in events) == 1
        assert isinstance(events[-1], Completed)
        assert difference(events[-1].frames, right) <= 1
        assert not any(Path(f"/proc/{pid}").exists() for pid in before.values())


@pytest.mark.gpu
def test_on_gpus_forwards_go_on_side_by_side_and_company_changes_nothing(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("it needs two GPUs")
    num_gpus = 4 if torch.cuda.device_count() > 3 else 2
    with serving("flux", tmp_path / "flux", device="cuda", num_gpus=num_gpus, elastic_sp=True) as served:
        sizes: list[dict[str, int]] = [{}, {"height": 24, "width": 40}]
        requests = [served.params(seed=n, num_inference_steps=8 + n, **sizes[n % 2]) for n in range(6)]
        rights = [served.completed(msgspec.structs.replace(params, exact=True)).frames for params in requests]
        # From the third time on graphs are replayed. Two requests have two ranks each of four.
        for num in (6, 6, 6, 1, 2, 2, 2):
            ends = served.portal.call(ends_of, served.engine, *requests[:num])
            for end, right in zip(ends, rights, strict=False):
                assert isinstance(end, Completed), end
                assert difference(end.frames, right) <= 2
        counts = [calls.num_ranks for calls in served.engine.statistics().calls if calls.name.startswith("transformer")]
        assert counts[0][1] > 0
