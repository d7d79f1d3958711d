"""Several replicas: the engine with ranks that have no model."""

import anyio

from engine.ranks import MortalRanks
from engine.streams import completed, ends_of, until
from sgld.config import EngineConfig, ParallelConfig
from sgld.engine.engine import Engine
from sgld.events import Completed, Failed
from sgld.sampling_params import SamplingParams


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


async def test_the_queue_of_all_replicas_together_has_the_limit() -> None:
    engine = Engine(config(num_replicas=3, max_queued_requests=4))
    assert [replica.scheduler._max_queued for replica in engine._replicas] == [2, 2, 2]
