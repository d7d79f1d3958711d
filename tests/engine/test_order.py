from hypothesis import assume, given
from hypothesis import strategies as st

from engine.calls import tracked
from sgld.engine.order import AGEING, MARGIN, in_order, oldest_first, score
from sgld.engine.remaining import Tracked


def names(*requests: Tracked, now: float = 0.0, tick_s: float = 0.0) -> str:
    """The order of requests with names of one letter."""
    return "".join(request.id for _, request in in_order([(r, score(r)) for r in requests], now, tick_s))


def test_least_remaining_time_goes_first() -> None:
    assert names(tracked("a", 3.0), tracked("b", 1.0), tracked("c", 2.0)) == "bca"


def test_equal_ones_go_in_order_of_arrival() -> None:
    assert names(tracked("b", 1.0), tracked("a", 1.0)) == "ab"


def test_what_is_not_known_is_tried() -> None:
    assert names(tracked("a", 1.0), tracked("b", None)) == "ba"


def test_waiting_outweighs_size_in_the_end() -> None:
    large = tracked("l", 100.0)
    assert names(large, tracked("s", 1.0, arrived_at=98 / AGEING)) == "sl"
    assert names(large, tracked("s", 1.0, arrived_at=100 / AGEING)) == "ls"


def test_a_second_of_waiting_counts_for_less_where_more_is_done_in_it() -> None:
    large, small = tracked("l", 100.0), tracked("s", 1.0, arrived_at=100 / AGEING)
    assert score(large) < score(small)
    assert score(large, num_ranks=4) > score(small, num_ranks=4)


def test_of_many_forwards_one_is_of_the_request_that_came_first() -> None:
    oldest, small, other = tracked("o", 9.0), tracked("s", 1.0, arrived_at=1.0), tracked("t", 2.0, arrived_at=2.0)
    every = [oldest, small, other]

    def names_with_oldest(waiting: list[Tracked], running: list[str]) -> str:
        ordered = in_order([(r, score(r)) for r in waiting], 3.0)
        return "".join(request.id for _, request in oldest_first(ordered, every, running))

    assert names_with_oldest(every, []) == "ost"
    assert names_with_oldest(every, ["o"]) == "sto", "it has one"
    assert names_with_oldest([small, other], []) == "st", "it is between two forwards"


def test_the_oldest_goes_before_no_higher_priority() -> None:
    oldest, urgent = tracked("o", 9.0), tracked("u", 9.0, arrived_at=1.0, priority=1)
    ordered = in_order([(r, score(r)) for r in (oldest, urgent)], 3.0)
    assert oldest_first(ordered, [oldest, urgent], []) == ordered


def test_higher_priority_goes_before_everything_else() -> None:
    urgent = tracked("u", 5.0, deadline_s=110.0)
    assert names(tracked("a", 1.0), urgent, tracked("p", 99.0, priority=1), tracked("q", 0.1, priority=-1)) == "puaq"


def test_deadline_counts_only_when_it_presses() -> None:
    dated = tracked("d", 10.0, deadline_s=100.0)
    assert names(dated, tracked("s", 1.0, arrived_at=80.0), now=80.0) == "sd"
    assert names(dated, tracked("s", 1.0, arrived_at=88.0), now=88.0) == "ds"


def test_deadline_presses_earlier_when_ticks_are_long() -> None:
    dated, small = tracked("d", 10.0, deadline_s=100.0), tracked("s", 1.0, arrived_at=80.0)
    assert names(dated, small, now=80.0, tick_s=5.0) == "ds"


def test_earlier_deadlines_press_because_of_those_behind_them() -> None:
    """Either one has time; both don't."""
    first, second = tracked("a", 30.0, deadline_s=50.0), tracked("b", 30.0, deadline_s=62.0)
    small = tracked("s", 1.0)
    assert names(first, small) == "sa"
    assert names(second, small) == "sb"
    assert names(first, second, small) == "abs"


def test_deadlines_press_because_of_higher_priorities() -> None:
    dated, small = tracked("d", 10.0, deadline_s=100.0), tracked("s", 1.0)
    assert names(dated, small, tracked("p", 85.0, priority=1)) == "pds"


def test_hopeless_deadline_goes_to_the_back() -> None:
    assert names(tracked("h", 5.0, deadline_s=4.0), tracked("l", 50.0), tracked("p", 60.0, priority=-1)) == "lhp"


def test_hopeless_one_is_like_any_other_after_a_while() -> None:
    late = tracked("h", 5.0, deadline_s=4.0)
    assert names(late, tracked("l", 50.0), now=7.9) == "lh"
    assert names(late, tracked("l", 50.0), now=8.1) == "hl"


def test_where_not_all_deadlines_can_be_met_the_longest_gives_way() -> None:
    long, short, other = tracked("l", 9.0, deadline_s=10.0), tracked("s", 6.0, deadline_s=11.0), tracked("o", 8.0)
    assert names(long, short, other) == "sol"


def test_levels_tell_who_must_not_be_delayed_for_whom() -> None:
    requests = [
        tracked("a", 1.0, deadline_s=2.1),
        tracked("b", 1.0),
        tracked("c", 9.0, deadline_s=2.0),
        tracked("d", 1.0, priority=1),
    ]
    levels = {request.id: level for level, request in in_order([(r, score(r)) for r in requests], 0.0)}
    assert levels["d"] < levels["a"] < levels["b"] < levels["c"]


@st.composite
def any_requests(draw: st.DrawFn) -> list[Tracked]:
    deadline = st.none() | st.floats(0.1, 100)
    return [
        tracked(
            chr(97 + index),
            draw(st.none() | st.floats(0, 50)),
            arrived_at=draw(st.floats(0, 20)),
            priority=draw(st.integers(-1, 1)),
            deadline_s=draw(deadline),
        )
        for index in range(draw(st.integers(1, 8)))
    ]


@given(any_requests(), st.floats(20, 100), st.floats(0, 5))
def test_everyone_has_one_place_and_levels_never_fall(requests: list[Tracked], now: float, tick_s: float) -> None:
    ordered = in_order([(r, score(r)) for r in requests], now, tick_s)
    assert sorted(request.id for _, request in ordered) == [request.id for request in requests]
    levels = [level for level, _ in ordered]
    assert levels == sorted(levels)
    priorities = [request.demand.priority for _, request in ordered]
    assert priorities == sorted(priorities, reverse=True)


@given(st.lists(st.floats(0.1, 20), min_size=1, max_size=6), st.floats(0.2, 1), st.data())
def test_deadlines_that_can_be_met_are_met(works: list[float], tick_s: float, data: st.DataObject) -> None:
    """Whatever else there is to do, if they leave the margin that is promised, and nothing shares a forward."""
    deadlines, total_s = [], 0.0
    for work_s in works:
        total_s += work_s
        deadlines.append(MARGIN * total_s + 3 * tick_s + data.draw(st.floats(0, 20)))
    assume(deadlines == sorted(deadlines))
    requests = [tracked(chr(97 + i), w, deadline_s=d) for i, (w, d) in enumerate(zip(works, deadlines, strict=True))]
    others = [tracked(name, data.draw(st.floats(0.1, 5))) for name in "xyz"]
    now, waiting = 0.0, [*requests, *others]
    while waiting:
        _, request = in_order([(r, score(r)) for r in waiting], now, tick_s)[0]
        assert request.remaining_s is not None
        step_s = min(tick_s, request.remaining_s)
        now += step_s
        request.remaining_s -= step_s
        if request.remaining_s < 1e-9:
            waiting.remove(request)
            assert request.deadline_at is None or now <= request.deadline_at + 1e-6
