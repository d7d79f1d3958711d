"""Who is to blame for a lost rank: the engine with ranks that have no model, and die as they are told."""

from engine.ranks import MortalRanks
from engine.streams import ends_of
from sgld.config import EngineConfig
from sgld.engine.engine import Engine
from sgld.events import Completed, Failed
from sgld.sampling_params import SamplingParams


async def test_request_that_shared_the_last_forward_of_a_rank_is_not_lost_with_the_culprit() -> None:
    # One may have run alone before the engine heard of all three.
    ranks = MortalRanks(3, 1)
    requests = [SamplingParams(prompt=prompt) for prompt in ("good", "bad", "fine")]
    async with Engine(EngineConfig(), rank_factory=ranks) as engine:
        # What never ran would be tried alone.
        engine._cost.recall([("c", 1, "eager", 1.0), ("c", 2, "eager", 1.0)])
        good, bad, fine = await ends_of(engine, *requests)
    assert isinstance(good, Completed)
    assert isinstance(fine, Completed)
    assert isinstance(bad, Failed)
    assert bad.code == "rank_lost"
    # The first loss may be anybody's; from then on they run apart.
    assert any(len(batch) > 1 for batch in ranks.batches)
    first_loss = next(index for index, batch in enumerate(ranks.batches) if "bad" in batch)
    assert all(len(batch) == 1 for batch in ranks.batches[first_loss + 1 :] if "bad" in batch)
    assert sum("bad" in batch for batch in ranks.batches) == 2


async def test_lost_rank_costs_nothing_but_time() -> None:
    ranks = MortalRanks(1)
    async with Engine(EngineConfig(), rank_factory=ranks) as engine:
        [bad] = await ends_of(engine, SamplingParams(prompt="bad"))
        [good] = await ends_of(engine, SamplingParams(prompt="good"))
    assert isinstance(bad, Failed)
    assert isinstance(good, Completed)
