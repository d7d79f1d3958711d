from sgld.engine.routing import LOAD_ADAPTER_S, Load, adapters_of, busiest, choose
from sgld.sampling_params import LoraChoice, SamplingParams

ADAPTER = ("a.safetensors", None)


def load(
    backlog_s: float | None = 0.0,
    num_requests: int = 0,
    *,
    is_ready: bool = True,
    adapters: tuple[str, ...] = (),
    num_queued: int | None = None,
) -> Load:
    waiting = num_requests if num_queued is None else num_queued
    return Load(is_ready, num_requests, backlog_s, frozenset((path, None) for path in adapters), waiting)


def test_least_backlog_gets_a_request() -> None:
    assert choose([load(3.0, 1), load(1.0, 9), load(2.0, 1)]) == 1
    assert choose([load(1.0), load(1.0)]) == 0


def test_fewest_requests_get_it_where_nothing_is_known() -> None:
    assert choose([load(None, 3), load(0.0, 2)]) == 1


def test_a_replica_without_rank_gets_it_last() -> None:
    assert choose([load(0.0, is_ready=False), load(100.0, 8)]) == 1
    assert choose([load(5.0, is_ready=False), load(1.0, is_ready=False)]) == 1


def test_an_adapter_that_is_there_is_worth_the_time_of_reading_it() -> None:
    loads = [load(1.0), load(1.0 + LOAD_ADAPTER_S / 2, adapters=("a.safetensors",))]
    assert choose(loads, {ADAPTER}) == 1
    assert choose([loads[0], load(1.0 + 2 * LOAD_ADAPTER_S, adapters=("a.safetensors",))], {ADAPTER}) == 0
    assert choose([load(None, 1), load(None, 1, adapters=("a.safetensors",))], {ADAPTER}) == 1


def test_who_has_one_request_keeps_it_unless_its_rank_is_lost() -> None:
    assert busiest([load(9.0, 1), load()]) is None
    assert busiest([load(9.0, 2), load(10.0, 2), load()]) == 1
    assert busiest([load(99.0, 5), load(1.0, 1, is_ready=False), load()]) == 1


def test_who_has_started_all_gives_nothing() -> None:
    assert busiest([load(9.0, 4, num_queued=0), load(2.0, 2), load()]) == 1
    assert busiest([load(9.0, 4, num_queued=0), load()]) is None


def test_adapters_of_a_request_are_those_with_a_path() -> None:
    choices = (LoraChoice(path="a.safetensors"), LoraChoice(nickname="b"))
    assert adapters_of(SamplingParams(prompt="x", lora=choices)) == {ADAPTER}
    assert adapters_of(SamplingParams(prompt="x")) == frozenset()
