from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.calls import LinearCost, call, tracked
from sgld.engine.batching import as_many_as_pay, preparing, together_s
from sgld.engine.cost import Cost, CostModel
from sgld.engine.demand import Demand, Profiles
from sgld.engine.remaining import Tracked
from sgld.messages import CallInfo

LEVEL = (0, 1)


def chosen(
    cost: Cost, *requests: Tracked, num_requests: int | None = None, max_batch_size: int = 16
) -> list[tuple[str, int]]:
    """Request and call of each row."""
    ordered = [(LEVEL, request) for request in requests]
    batch = as_many_as_pay(ordered, num_requests or len(requests), cost, max_batch_size)
    return [(request.id, info.id) for request, info in batch]


def one(name: str, **fields: str | None) -> Tracked:
    return tracked(name, 1.0, calls=(call(name, **fields),))  # type: ignore[arg-type]


def test_free_row_joins() -> None:
    assert len(chosen(LinearCost(fixed_s=1.0, row_s=0.0), one("a"), one("b"))) == 2


def test_row_that_saves_nothing_does_not_join() -> None:
    assert len(chosen(LinearCost(fixed_s=0.0, row_s=1.0), one("a"), one("b"))) == 1


@pytest.mark.parametrize(("row_s", "expected"), [(0.49, 2), (0.51, 1)])
def test_row_joins_if_it_delays_less_than_it_saves(row_s: float, expected: int) -> None:
    """Two wait: the second costs the first Δt, and saves itself t(1) - Δt; t(1) is 1."""
    assert len(chosen(LinearCost(fixed_s=1 - row_s, row_s=row_s), one("a"), one("b"))) == expected


def test_more_join_when_more_wait() -> None:
    cost = LinearCost(fixed_s=0.4, row_s=0.6)
    requests = [one(name) for name in "abcdef"]
    assert len(chosen(cost, *requests)) < len(chosen(cost, *requests, num_requests=20))


def test_those_between_count_though_they_are_not_in_the_batch() -> None:
    """A row of the last one delays all before it, also those that can't share the forward."""
    cost = LinearCost(fixed_s=0.6, row_s=0.4)
    assert len(chosen(cost, one("a"), one("d"), one("x", merge_key="n"), one("y", merge_key="n"))) == 2
    assert len(chosen(cost, one("a"), one("x", merge_key="n"), one("y", merge_key="n"), one("d"))) == 1


def test_second_call_of_the_first_request_costs_nobody_who_is_more_urgent() -> None:
    pair = call("a"), call("a")
    both = [("a", pair[0].id), ("a", pair[1].id)]
    assert chosen(LinearCost(fixed_s=0.1, row_s=0.9), tracked("a", 1.0, calls=pair), one("b")) == both
    assert len(chosen(LinearCost(fixed_s=0.0, row_s=1.0), tracked("a", 1.0, calls=pair))) == 1


def test_pair_of_another_request_is_weighed_as_one_request() -> None:
    """Requests count, not their calls: two of one request don't outvote the first."""
    pair = call("b"), call("b")
    assert len(chosen(LinearCost(fixed_s=0.4, row_s=0.6), one("a"), tracked("b", 1.0, calls=pair))) == 1
    assert len(chosen(LinearCost(fixed_s=0.6, row_s=0.4), one("a"), tracked("b", 1.0, calls=pair))) == 3


def test_row_that_does_not_pay_joins_if_the_next_ones_pay_for_it() -> None:
    """Three rows run in a slower way than four: three would be left out, and four never come about."""
    cost = CostModel()
    for rows, elapsed_s in ((1, 1.0), (2, 1.2), (3, 2.6), (4, 1.6)):
        cost.recall([("c", rows, "eager", elapsed_s)])
    assert len(chosen(cost, *(one(name) for name in "abcd"))) == 4
    assert len(chosen(cost, *(one(name) for name in "abc"))) == 2


def test_batch_is_limited() -> None:
    assert len(chosen(LinearCost(fixed_s=1.0, row_s=0.0), *(one(name) for name in "abcde"), max_batch_size=3)) == 3


def test_calls_join_only_with_an_equal_key() -> None:
    free = LinearCost(fixed_s=1.0, row_s=0.0)
    requests = [one("a"), one("b", merge_key="n"), one("c", merge_key=None), one("d")]
    assert [name for name, _ in chosen(free, *requests)] == ["a", "d"]
    assert len(chosen(free, one("a", merge_key=None), one("b", merge_key=None))) == 1


def test_suspects_share_with_themselves_only() -> None:
    free, pair = LinearCost(fixed_s=1.0, row_s=0.0), (call("a"), call("a"))
    suspect = tracked("a", 1.0, calls=pair)
    suspect.is_suspect = True
    assert [name for name, _ in chosen(free, suspect, one("b"))] == ["a", "a"]
    assert [name for name, _ in chosen(free, one("b"), suspect, one("c"))] == ["b", "c"]


def test_nobody_of_a_later_level_joins() -> None:
    first, second = one("a"), one("b")
    ordered = [((-1, 1), first), ((0, 1), second)]
    assert len(as_many_as_pay(ordered, 2, LinearCost(fixed_s=1.0, row_s=0.0), 16)) == 1


def test_what_never_ran_is_tried_alone_and_batches_grow() -> None:
    cost = CostModel()
    requests = [one(name) for name in "abcdefgh"]
    sizes = []
    for _ in range(7):
        sizes.append(len(chosen(cost, *requests)))
        cost.observe("c", sizes[-1], 1.0)
    assert sizes == [1, 2, 2, 4, 4, 8, 8]


@given(st.lists(st.floats(0.1, 50), min_size=1, max_size=8), st.floats(0, 1), st.floats(0.1, 50), st.integers(1, 4))
def test_more_requests_never_take_less_time_together(
    works: list[float], row_s: float, more_s: float, max_batch_size: int
) -> None:
    cost = LinearCost(fixed_s=1 - row_s, row_s=row_s)
    requests = [(one(chr(97 + index)), work_s) for index, work_s in enumerate(works)]
    some_s = together_s(requests, cost, max_batch_size)
    assert max(works) - 1e-6 <= some_s <= sum(works) + 1e-6
    assert together_s([*requests, (one("z"), more_s)], cost, max_batch_size) >= some_s - 1e-6


def test_time_together_is_that_of_their_forwards() -> None:
    """Two steps in company take 1.5 s each, then eight alone 1 s each; what can't merge comes on top."""
    cost = LinearCost(fixed_s=0.5, row_s=0.5)
    requests = [(one("a"), 10.0), (one("b"), 2.0), (one("c", merge_key=None), 4.0)]
    assert together_s(requests, cost, 16) == pytest.approx(2 * 1.5 + 8 * 1.0 + 4.0)


def test_info_of_the_batch_is_that_of_the_calls() -> None:
    infos: list[CallInfo] = [call("a"), call("b")]
    requests = [tracked("a", 1.0, calls=(infos[0],)), tracked("b", 1.0, calls=(infos[1],))]
    assert chosen(LinearCost(fixed_s=1.0, row_s=0.0), *requests) == [("a", infos[0].id), ("b", infos[1].id)]


FREE = LinearCost(fixed_s=1.0, row_s=0.0, by_key={"encode": 0.5})


def known(cost: Cost = FREE) -> Profiles:
    """Of a request with ten steps of the key that calls have here."""
    profiles = Profiles(cost)
    profiles.learn(Demand(), Counter({("encode", "encode", 1): 1, ("denoise", "c", 1): 10}))
    return profiles


def denoising(name: str, remaining_s: float = 9.0, **fields: str | None) -> Tracked:
    made = tracked(name, remaining_s)
    made.pending(call(name, **fields))  # type: ignore[arg-type]
    return made


def newcomer(name: str, cost_key: str = "encode") -> Tracked:
    made = tracked(name, 10.5)
    made.pending(call(name, kind="encode", cost_key=cost_key, merge_key=None, num_steps=0))
    return made


def place_of(*requests: Tracked, cost: Cost = FREE, profiles: Profiles | None = None) -> int | None:
    """Who should encode first, where all are of one level."""
    ordered = [(LEVEL, request) for request in requests]
    batch = as_many_as_pay(ordered, len(requests), cost, 16)
    return preparing(ordered, batch, len(requests), cost, profiles or known(cost))


def test_newcomer_encodes_first_if_it_can_share_then() -> None:
    assert place_of(denoising("a"), newcomer("b")) == 1
    assert place_of(denoising("a"), denoising("b"), newcomer("c"), newcomer("d")) == 2


def test_newcomer_waits_where_its_rows_would_not_pay() -> None:
    assert place_of(denoising("a"), newcomer("b"), cost=LinearCost(fixed_s=0.0, row_s=1.0)) is None


def test_newcomer_waits_if_encoding_costs_more_than_the_rest_of_the_batch_saves() -> None:
    slow = LinearCost(fixed_s=1.0, row_s=0.0, by_key={"encode": 5.0})
    assert place_of(denoising("a", 9.0), newcomer("b"), cost=slow) == 1
    assert place_of(denoising("a", 2.0), newcomer("b"), cost=slow) is None


def test_newcomer_waits_if_it_cannot_share() -> None:
    suspect, other = newcomer("b"), Profiles(FREE)
    suspect.is_suspect = True
    other.learn(Demand(), Counter({("denoise", "another key", 1): 10}))
    assert place_of(denoising("a"), suspect) is None
    assert place_of(denoising("a", merge_key=None), newcomer("b")) is None
    assert place_of(denoising("a"), newcomer("b"), profiles=other) is None
    assert place_of(denoising("a"), newcomer("b"), profiles=Profiles(FREE)) is None
    ordered = [((-1, 1), denoising("a")), ((0, 1), newcomer("b"))]
    assert preparing(ordered, as_many_as_pay(ordered, 2, FREE, 16), 2, FREE, known()) is None
