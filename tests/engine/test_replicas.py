"""Several replicas: the engine with ranks that have no model."""

import anyio
import pytest

from engine.ranks import MODEL, MortalRanks
from engine.streams import completed, ends_of, until
from sgld.config import EngineConfig, ParallelConfig
from sgld.engine.cost import CostModel
from sgld.engine.demand import Profiles
from sgld.engine.engine import Engine
from sgld.engine.replicas import Replica, balance
from sgld.engine.scheduler import Batch
from sgld.errors import ModelError, QueueFull, RankLost
from sgld.events import Completed, Failed
from sgld.messages import Ran, with_note
from sgld.parallel import Ranks
from sgld.sampling_params import LoraChoice, SamplingParams


def config(num_replicas: int = 2, **options: int) -> EngineConfig:
    return EngineConfig(parallel=ParallelConfig(dp_size=num_replicas), **options)  # type: ignore[arg-type]


def asked(*prompts: str) -> list[SamplingParams]:
    return [SamplingParams(prompt=prompt) for prompt in prompts]


async def all_ready(engine: Engine) -> None:
    await until(lambda: all(replica.is_ready for replica in engine.statistics().replicas))


async def test_requests_are_spread_over_the_replicas() -> None:
    ranks = MortalRanks()
    async with Engine(config(), rank_factory=ranks) as engine:
        await all_ready(engine)
        ends = await ends_of(engine, *asked("a", "b", "c", "d"))
    assert all(isinstance(end, Completed) for end in ends)
    assert set(ranks.replicas) == {0, 1}
    assert sorted(prompt for batch in ranks.batches for prompt in batch) == ["a", "b", "c", "d"]


async def test_outputs_of_one_request_are_spread_and_have_one_stream() -> None:
    ranks = MortalRanks()
    async with Engine(config(), rank_factory=ranks) as engine:
        await all_ready(engine)
        params = SamplingParams(prompt="a", num_outputs_per_prompt=4)
        ends = [event async for event in engine.generate(params) if isinstance(event, Completed)]
    assert sorted(end.output_index for end in ends) == [0, 1, 2, 3]
    assert set(ranks.replicas) == {0, 1}


@pytest.mark.parametrize(("first", "replica"), [("keep", 1), ("forget", 0)])
async def test_requests_go_where_their_adapter_is(first: str, replica: int) -> None:
    """Otherwise the first replica gets one that comes while nothing runs."""
    ranks = MortalRanks()
    adapted = SamplingParams(prompt=first, lora=(LoraChoice(path="/adapters/style"),))
    async with Engine(config(), rank_factory=ranks) as engine, anyio.create_task_group() as tasks:
        await all_ready(engine)
        tasks.start_soon(completed, engine, SamplingParams(prompt="wait"))
        await until(lambda: ranks.replicas == [0])
        await completed(engine, adapted)
        ranks.go.set()
        await until(lambda: engine.statistics().num_running == 0)
        await ends_of(engine, *asked("c"))
        await completed(engine, adapted)
    assert ranks.replicas == [0, 1, 0, replica]


async def test_what_waits_behind_a_long_request_goes_to_who_has_nothing_to_do() -> None:
    ranks = MortalRanks()
    async with Engine(config(max_running_requests=1), rank_factory=ranks) as engine, anyio.create_task_group() as tasks:
        await all_ready(engine)
        tasks.start_soon(ends_of, engine, *asked("wait"))
        await until(lambda: ranks.replicas)
        ends = await ends_of(engine, *asked("a", "b", "c", "d", "e"))
        assert all(isinstance(end, Completed) for end in ends)
        busy = ranks.replicas[0]
        assert ranks.replicas[1:] == [1 - busy] * 5
        ranks.go.set()


async def test_requests_of_a_lost_rank_go_on_elsewhere_meanwhile() -> None:
    ranks = MortalRanks()
    async with Engine(config(), rank_factory=ranks) as engine:
        await all_ready(engine)
        bad, *good = await ends_of(engine, *asked("bad", "a", "b", "c"))
        assert isinstance(bad, Failed)
        assert all(isinstance(end, Completed) for end in good)
        assert (await completed(engine, SamplingParams(prompt="z"))).seed is not None
        assert engine.statistics().num_restarts == 2


async def test_request_of_a_lost_rank_goes_to_one_that_has_nothing_to_do() -> None:
    """And so has nothing to say: the engine must turn to it."""
    ranks = MortalRanks(devices=("cpu", "cpu", "slow"))
    async with Engine(config(), rank_factory=ranks) as engine:
        await all_ready(engine)
        with anyio.fail_after(20):
            await completed(engine, SamplingParams(prompt="once"))
    assert ranks.replicas == [0, 1]


async def test_all_requests_of_a_lost_rank_go_elsewhere_at_once() -> None:
    ranks = MortalRanks()
    async with Engine(config(), rank_factory=ranks) as engine, anyio.create_task_group() as tasks:
        await all_ready(engine)
        lost, other = engine._replicas
        tasks.start_soon(ends_of, engine, *asked("wait", "wait", "wait", "wait"))
        await until(lambda: engine.statistics().num_running == 4)
        for replica in (lost, other):
            assert engine._requests.num_of(replica.index) == 2
        lost.lost()
        engine._requests.run_again("it is lost", (), lost.index)
        balance(engine._replicas, engine._requests)
        assert [engine._requests.num_of(replica.index) for replica in (lost, other)] == [0, 4]
        ranks.go.set()
        await until(lambda: engine.statistics().num_completed == 4)


async def test_replica_that_cannot_load_again_ends_nobody_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    ranks = MortalRanks(devices=("cpu", "cpu", "broken"))
    async with Engine(config(), rank_factory=ranks) as engine:
        await all_ready(engine)
        bad, *good = await ends_of(engine, *asked("bad", "a", "b", "c"))
        assert isinstance(bad, Failed)
        assert all(isinstance(end, Completed) for end in good)
        await until(lambda: engine.statistics().num_restarts == 3)
    assert "replica 0: the model can't be loaded again: the device has no memory" in caplog.text


async def test_replicas_on_other_devices_are_refused() -> None:
    ranks = MortalRanks(devices=("cuda", "cpu"))
    async with Engine(config(), rank_factory=ranks) as engine:
        with pytest.raises(ModelError, match="but the model is served on"):
            await completed(engine, SamplingParams(prompt="wait"))


async def test_the_queue_of_all_replicas_together_has_the_limit() -> None:
    ranks = MortalRanks()
    limits = config(max_queued_requests=3, max_running_requests=1)
    async with Engine(limits, rank_factory=ranks) as engine, anyio.create_task_group() as tasks:
        await all_ready(engine)
        tasks.start_soon(ends_of, engine, *asked("wait", "wait", "wait", "wait", "wait"))
        await until(lambda: (engine.statistics().num_running, engine.statistics().num_queued) == (2, 3))
        with pytest.raises(QueueFull, match="3 requests wait and 1 more would exceed the limit of 3"):
            await completed(engine, SamplingParams(prompt="a"))
        ranks.go.set()


def test_what_two_replicas_find_out_is_noted_once() -> None:
    noted = with_note(with_note(MODEL, "vae", "fp32"), "vae", "compiled")
    assert noted.decisions == {"vae": "fp32; compiled"}
    assert with_note(noted, "vae", "compiled") == noted


def test_ranks_that_hang_beside_others_are_found_by_what_these_compute() -> None:
    config = EngineConfig(run_timeout_s=60.0, parallel=ParallelConfig(num_gpus=2, elastic_sp=True))
    cost = CostModel()
    replica = Replica(0, config, cost, Profiles(cost))
    replica.running = {0: Batch((1,), ("a",), 1, 1.0), 1: Batch((2,), ("b",), 25, 1.0, Ranks(1, 1))}
    reply = Ran(call_ids=(1,), cost_key="c", rows=1, elapsed_s=50.0, is_timed=True, ranks=Ranks(0, 1))
    for _ in range(2):
        replica.ran(reply)
    with pytest.raises(RankLost, match="rank 1 hung"):
        replica.ran(reply)
