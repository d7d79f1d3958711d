"""Adapters of requests, from the engine to the picture."""

import threading
import warnings
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from models.adapters import as_diffusers, matrices
from numpy.typing import NDArray
from pipelines import build

from engine.streams import TIMEOUT_S, completed, difference, ends_of, events_of, is_idle, params_of, plain, until
from sgld.config import EngineConfig, LoraConfig
from sgld.engine.adapters import EngineLoras
from sgld.engine.engine import Engine
from sgld.errors import EngineClosed, InvalidRequest, ModelError, RankLost
from sgld.events import Completed, Failed, Progress
from sgld.messages import LoraLoaded
from sgld.models import lora
from sgld.models.lora_files import find
from sgld.sampling_params import LoraChoice, SamplingParams
from sgld.testing import InlineReplica

Pipeline = tuple[Any, dict[str, Any]]


@pytest.fixture(scope="module")
def flux() -> Pipeline:
    return build("flux")


@pytest.fixture(scope="module")
def paths(flux: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapters")
    made = (matrices(flux[0], seed, rank=4, only=lambda name: name.startswith("transformer")) for seed in range(3))
    return [str(as_diffusers(folder / f"{i}.safetensors", layers)) for i, layers in enumerate(made)]


@pytest.fixture(scope="module")
def reference(paths: list[str]) -> Any:
    """The same pipeline with the adapters as diffusers loads them."""
    pipeline, _ = build("flux")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index, path in enumerate(paths):
            pipeline.load_lora_weights(path, adapter_name=str(index))
    return pipeline


def expected(reference: Any, params: SamplingParams, *used: tuple[int, float]) -> NDArray[np.uint8]:
    reference.enable_lora()
    if used:
        reference.set_adapters([str(index) for index, _ in used], [scale for _, scale in used])
    else:
        reference.disable_lora()
    return plain(reference, params)


@asynccontextmanager
async def serving(flux: Pipeline, **config: Any) -> AsyncIterator[Engine]:
    settings = EngineConfig(device="cpu", adapters=LoraConfig(**config))
    async with Engine(settings, rank_factory=InlineReplica(flux[0])) as engine:
        yield engine
        assert is_idle(engine)
    assert not [thread.name for thread in threading.enumerate() if thread.name == "adapters"]


async def test_requests_get_their_own_adapters_or_those_of_the_start(
    flux: Pipeline, paths: list[str], reference: Any
) -> None:
    params = params_of(flux[1])
    choices: Sequence[tuple[Any, tuple[tuple[int, float], ...]]] = [
        (None, ((0, 0.5), (1, 0.5))),
        ((), ()),
        ((LoraChoice(nickname="1", scale=2.0),), ((1, 2.0),)),
        ((LoraChoice(path=paths[2]),), ((2, 1.0),)),
    ]
    requests = [params_of(flux[1], lora=chosen) for chosen, _ in choices]
    async with serving(flux, lora_path=tuple(paths[:2]), lora_scale=(0.5,)) as engine:
        ends = await ends_of(engine, *requests)
        held = engine.statistics().replicas[0].adapters
    for end, (_, used) in zip(ends, choices, strict=True):
        assert isinstance(end, Completed), end
        assert difference(end.frames, expected(reference, params, *used)) <= 1
    assert (held.num_adapters, held.num_slots) == (3, 3)
    assert held.adapter_bytes > 0 < held.slot_bytes


async def test_adapters_are_loaded_while_others_denoise(
    flux: Pipeline, paths: list[str], reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def slow_find(path: str) -> Any:
        assert go.wait(TIMEOUT_S)
        return find(path)

    monkeypatch.setattr(lora, "find", slow_find)
    other = params_of(flux[1], num_inference_steps=6)
    mine = params_of(flux[1], lora=(LoraChoice(path=paths[0]),))
    async with serving(flux) as engine:
        with anyio.fail_after(TIMEOUT_S):
            async with aclosing(engine.generate(mine)) as events, aclosing(engine.generate(other)) as others:
                await anext(events)
                steps = [event async for event in others if isinstance(event, Progress)]
                # All of it ran while the adapter was being read.
                assert len(steps) == 6
                assert not go.is_set()
                go.set()
                rest = [event async for event in events]
    assert isinstance(rest[-1], Completed)
    assert difference(rest[-1].frames, expected(reference, params_of(flux[1]), (0, 1.0))) <= 1


async def test_adapters_that_are_set_are_for_requests_that_come_then(
    flux: Pipeline, paths: list[str], reference: Any
) -> None:
    params = params_of(flux[1])
    async with serving(flux) as engine:
        before = await completed(engine, params)
        await engine.loras.set([LoraChoice(nickname="a", path=paths[0], scale=0.7)])
        after = await completed(engine, params)
        engine.loras.switch(is_on=False)
        off = await completed(engine, params)
        engine.loras.unload("a")
        with pytest.raises(InvalidRequest, match="no LoRA adapter 'a'"):
            await completed(engine, params_of(flux[1], lora=(LoraChoice(nickname="a"),)))
        assert engine.loras.known.registered == ()
    assert np.array_equal(before.frames, off.frames)
    assert difference(after.frames, expected(reference, params, (0, 0.7))) <= 1
    assert difference(after.frames, before.frames) > 1


async def test_the_engine_knows_which_adapters_a_rank_still_has(
    flux: Pipeline, paths: list[str], tmp_path: Path
) -> None:
    """There is room for one; a file that is none is none."""
    (tmp_path / "none.safetensors").write_bytes(b"no adapter")
    used = [*paths[:2], str(tmp_path / "none.safetensors")]
    size_bytes = lora.read(paths[0], lora.adaptable(flux[0])).size_bytes
    async with serving(flux, max_lora_bytes=size_bytes) as engine:
        for path in used:
            await events_of(engine, params_of(flux[1], num_inference_steps=1, lora=(LoraChoice(path=path),)))
        [replica] = engine._replicas
        await until(lambda: replica.adapters == {(paths[1], None)})


async def test_adapters_that_can_not_be_used_fail_their_request_only(flux: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_text("no")
    choice = LoraChoice(nickname="bad", path=str(tmp_path / "bad.safetensors"))
    async with serving(flux) as engine:
        bad, good = await ends_of(engine, params_of(flux[1], lora=(choice,)), params_of(flux[1]))
        with pytest.raises(InvalidRequest, match=r"bad\.safetensors"):
            await engine.loras.set([choice])
        assert engine.loras.known.registered == ()
    assert isinstance(bad, Failed)
    assert (bad.code, "bad.safetensors" in bad.message) == ("invalid_request", True)
    assert isinstance(good, Completed)


async def test_a_model_is_not_served_without_its_adapters(flux: Pipeline) -> None:
    async with serving(flux, lora_path=("missing.safetensors",)) as engine:
        with pytest.raises(ModelError, match=r"missing\.safetensors"), anyio.fail_after(TIMEOUT_S):
            await engine.ready()


async def test_who_waits_for_an_adapter_hears_that_the_rank_was_lost() -> None:
    loras = EngineLoras(LoraConfig(), lambda _command: [0])

    async def lose() -> None:
        await anyio.wait_all_tasks_blocked()
        loras.lost()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lose)
        with pytest.raises(RankLost, match="lost while it loaded"):
            await loras.set([LoraChoice(nickname="a", path="a.safetensors")])
    with pytest.raises(EngineClosed, match="isn't ready"):
        await EngineLoras(LoraConfig(), lambda _command: []).set([LoraChoice(nickname="a", path="a")])


async def test_a_target_that_is_not_changed_is_refused() -> None:
    def send(command: Any) -> list[int]:
        loras.heard(LoraLoaded(path=command.path, size_bytes=1, num_layers={"transformer": 3}))
        return [0]

    loras = EngineLoras(LoraConfig(), send)
    with pytest.raises(InvalidRequest, match="changes nothing in 'unet', but transformer"):
        await loras.set([LoraChoice(nickname="a", path="a.safetensors", target="unet")], "unet")


async def test_an_adapter_is_loaded_when_each_replica_has_it() -> None:
    loras = EngineLoras(LoraConfig(), lambda _command: [0, 1])
    reply = LoraLoaded(path="a.safetensors", size_bytes=1, num_layers={"transformer": 3})
    is_set = False

    async def choose() -> None:
        nonlocal is_set
        await loras.set([LoraChoice(nickname="a", path="a.safetensors")])
        is_set = True

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(choose)
        await anyio.wait_all_tasks_blocked()
        loras.heard(reply, 0)
        await anyio.wait_all_tasks_blocked()
        assert not is_set
        loras.heard(reply, 1)
    assert is_set


async def test_replica_that_loads_does_not_end_what_others_read() -> None:
    loras = EngineLoras(LoraConfig(), lambda command: [0])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(loras.set, [LoraChoice(path="a.safetensors", nickname="a")])
        await anyio.wait_all_tasks_blocked()
        loras.lost(1)
        loras.heard(LoraLoaded(path="a.safetensors", size_bytes=1, num_layers={"transformer": 1}), 0)
    assert [adapter.nickname for adapter in loras.known.registered] == ["a"]
