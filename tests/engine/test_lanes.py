from dataclasses import dataclass
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.calls import call, tracked
from sgld.engine.lanes import Degrees, Placed, free_blocks, placed
from sgld.engine.remaining import Tracked
from sgld.messages import CallInfo
from sgld.parallel import Ranks

# Seconds of one row, and of each further one, by size and number of ranks.
SMALL, LARGE = {1: 1.0, 2: 1.5, 4: 2.0}, {1: 8.0, 2: 4.5, 4: 2.5}


@dataclass(frozen=True)
class Table:
    """Times that are known."""

    seconds: dict[str, dict[int, float]]
    row_share: float = 1.0
    version: int = 0

    def predict(self, key: str, rows: int, degree: int = 1) -> float | None:
        alone_s = self.seconds.get(key, {}).get(degree)
        return None if alone_s is None else alone_s * (1 + self.row_share * (rows - 1))

    def estimate(self, key: str, rows: int) -> float | None:
        return self.predict(key, rows)

    def share(self, key: str, num_ranks: int) -> float:
        return 1.0


KNOWN = Table({"small": SMALL, "large": LARGE})


def shared(
    name: str, size: str, *, max_degree: int = 4, is_bound: bool = False, merge_key: str | None = "m"
) -> Tracked:
    info = call(name, cost_key=size, max_degree=max_degree, is_bound=is_bound, merge_key=merge_key)
    return tracked(name, 1.0, calls=(info,))


def place(
    *requests: Tracked, busy: tuple[Ranks, ...] = (), num_requests: int | None = None, cost: Table = KNOWN, num: int = 4
) -> Placed | None:
    ordered = [((0, 0), request) for request in requests]
    return placed(ordered, (), busy, num_requests or len(requests), Degrees(cost, num), 16)


def chosen(found: Placed | None) -> tuple[list[str], Ranks]:
    assert found is not None
    return [request.id for request, _ in found.calls], found.ranks


def calls_of(*requests: Tracked) -> list[CallInfo]:
    return [info for request in requests for info in request.calls.values()]


@given(st.integers(0, 3), st.data())
def test_free_blocks_are_aligned_and_all_that_is_free(power: int, data: st.DataObject) -> None:
    num_ranks = 2**power
    every = [Ranks(first, 2**n) for n in range(power + 1) for first in range(0, num_ranks, 2**n)]
    busy = data.draw(st.lists(st.sampled_from(every), max_size=3))
    blocks = free_blocks(busy, num_ranks)
    taken = {rank for ranks in busy for rank in ranks.every}
    assert sorted(rank for block in blocks for rank in block.every) == sorted(set(range(num_ranks)) - taken)
    assert all(block in every for block in blocks)
    # None of them could be one.
    for one, other in combinations(blocks, 2):
        assert one.num != other.num or one.first // (2 * one.num) != other.first // (2 * one.num)


def test_lone_large_request_has_all_ranks_and_a_small_one_has_one() -> None:
    assert chosen(place(shared("a", "large"))) == (["a"], Ranks(0, 4))
    assert chosen(place(shared("a", "small"))) == (["a"], Ranks(3, 1))


def test_the_more_requests_there_are_the_fewer_ranks_each_has() -> None:
    degrees = [chosen(place(shared("a", "large"), num_requests=n))[1].num for n in (1, 2, 8, 40)]
    assert degrees == sorted(degrees, reverse=True)
    assert (degrees[0], degrees[-1]) == (4, 1)


@pytest.mark.parametrize(("num_waiting", "degree"), [(1, 4), (2, 2), (3, 2), (4, 1), (9, 1)])
def test_forward_leaves_a_rank_to_each_call_that_waits(num_waiting: int, degree: int) -> None:
    """Together ranks do less than each for itself, even where a forward gains as much as here."""
    requests = [shared(str(n), "large", merge_key=None) for n in range(num_waiting)]
    assert chosen(place(*requests, cost=Table({"large": {1: 8.0, 2: 4.01, 4: 2.01}})))[1].num == degree


def test_urgent_request_leaves_no_rank_to_those_that_may_come_later() -> None:
    cost = Table({"large": {1: 8.0, 2: 4.01, 4: 2.01}})
    urgent, *others = (((min(n, 1) - 1, 0), shared(str(n), "large", merge_key=None)) for n in range(4))
    assert chosen(placed([urgent, *others], (), (), 4, Degrees(cost, 4), 16)) == (["0"], Ranks(0, 4))
    assert chosen(placed([urgent, urgent[:1] + others[0][1:]], (), (), 2, Degrees(cost, 4), 16))[1].num == 2


def test_call_that_has_to_wait_for_the_first_rank_is_left_none_of_the_others() -> None:
    bound = shared("b", "small", max_degree=1, is_bound=True)
    assert chosen(place(shared("a", "large"), bound, busy=(Ranks(0, 1),)))[1] == Ranks(2, 2)
    assert chosen(place(shared("a", "large"), bound, busy=(Ranks(0, 2),))) == (["a"], Ranks(2, 2))


def test_forward_has_no_more_ranks_than_can_share_it_or_are_free() -> None:
    assert chosen(place(shared("a", "large", max_degree=2)))[1].num == 2
    assert chosen(place(shared("a", "large"), busy=(Ranks(0, 1),)))[1] == Ranks(2, 2)
    assert place(shared("a", "large"), busy=(Ranks(0, 4),)) is None


def test_what_only_the_first_ranks_can_run_waits_for_them_and_others_go_on() -> None:
    bound, free = shared("a", "small", max_degree=1, is_bound=True), shared("b", "small", merge_key="n")
    assert chosen(place(bound, free)) == chosen(place(free, bound)) == (["a"], Ranks(0, 1))
    assert chosen(place(bound, free, busy=(Ranks(0, 2),))) == (["b"], Ranks(3, 1))


def test_calls_run_beside_one_another_as_long_as_ranks_are_free_and_share_forwards_then() -> None:
    cost = Table({"small": {1: 1.0}}, row_share=0.1)
    requests = [shared(name, "small") for name in "abcde"]
    assert chosen(place(*requests[:4], cost=cost))[0] == ["a"]
    assert chosen(place(*requests[:4], cost=cost, busy=(Ranks(0, 2), Ranks(2, 1))))[0] == ["a", "b", "c", "d"]
    assert chosen(place(*requests, cost=cost))[0] == ["a", "b"], "as many on each of four ranks"


def test_calls_that_run_already_are_left_alone() -> None:
    one, other = shared("a", "small"), shared("b", "small")
    found = placed([((0, 0), one), ((0, 0), other)], [info.id for info in calls_of(one)], (), 2, Degrees(KNOWN, 2), 16)
    assert chosen(found)[0] == ["b"]


def test_both_calls_of_a_request_run_beside_one_another() -> None:
    """As both halves of guidance."""
    pair = tuple(call("a", cost_key="small", max_degree=4, is_bound=False) for _ in range(2))
    request = tracked("a", 1.0, calls=pair)
    first = placed([((0, 0), request)], (), (), 1, Degrees(KNOWN, 2), 16)
    assert first is not None
    second = placed([((0, 0), request)], [info.id for _, info in first.calls], (first.ranks,), 1, Degrees(KNOWN, 2), 16)
    assert second is not None
    assert {info.id for part in (first, second) for _, info in part.calls} == {info.id for info in pair}
    assert {first.ranks, second.ranks} == {Ranks(0, 1), Ranks(1, 1)}


@pytest.mark.parametrize("known", [{}, {1: 8.0}, {1: 8.0, 2: 7.9}], ids=["nothing", "one", "two"])
def test_degrees_that_are_unknown_are_not_chosen_here(known: dict[int, float]) -> None:
    """The cost model says which are tried."""
    assert Degrees(Table({"large": known}), 4).best_degree(calls_of(shared("a", "large"))[0], 1) <= max(
        known, default=1
    )
