"""Which request goes first: pure functions of what each one asks, has left, and has waited."""

import heapq
from collections.abc import Collection, Iterable, Sequence
from itertools import groupby

from sgld.engine.remaining import Tracked

# A second of waiting counts like so much less to do: a request with R seconds to do is overtaken by what arrives in
# the next R / AGEING seconds at most. bench/queueing.py shows what it costs and brings.
AGEING = 0.03
# Deadlines press this much earlier than the predictions say.
MARGIN = 1.25

# One rank in so many is for the request that came first. With 2 ranks that would be half of all, and costs the others
# more than it brings; of 4 it makes p95 of all requests 2 % shorter and the mean 1 % longer (bench/degrees.py).
RANKS_BY_OLDEST = 4

Level = tuple[int, int]
"""Priority (negative) and class: what comes in an earlier level isn't delayed for a later one."""
_PRESSING, _PLAIN, _HOPELESS = range(3)


def score(request: Tracked, num_ranks: int = 1) -> float:
    """Remaining seconds minus the credit for waiting, but for what is the same for all; the least goes first.

    What isn't known is tried.

    :param num_ranks: so many can do as much more meanwhile, so a second of waiting counts for less.
    """
    return (request.remaining_s or 0.0) + AGEING / num_ranks * request.arrived_at


def in_order(requests: Iterable[tuple[Tracked, float]], now: float, tick_s: float = 0.0) -> list[tuple[Level, Tracked]]:
    """Requests with their scores in the order of service, each with its level.

    :param tick_s: how long it may take until there is another decision.

    1. A higher priority goes first.
    2. Deadlines go first where they press: where the work that must be done until one of them takes nearly all the
       time that is left.
    3. Least remaining time, with ageing.
    4. Who can't meet its deadline any more comes last, for as long again as it allowed; then it is like any other.
    """
    ranked = sorted(requests, key=lambda pair: (-pair[0].demand.priority, pair[1], pair[0].number))
    if all(request.demand.deadline_s is None for request, _ in ranked):
        return [((-request.demand.priority, _PLAIN), request) for request, _ in ranked]
    ordered: list[tuple[Level, Tracked]] = []
    ahead_s = 0.0
    for priority, pairs in groupby(ranked, key=lambda pair: pair[0].demand.priority):
        level = [request for request, _ in pairs]
        classes = _classes(level, now, ahead_s, tick_s)
        ordered += [((-priority, number), request) for number, part in enumerate(classes) for request in part]
        ahead_s += sum(request.remaining_s or 0.0 for request in level)
    return ordered


def oldest_first(
    ordered: list[tuple[Level, Tracked]], started: Iterable[Tracked], running: Collection[str]
) -> list[tuple[Level, Tracked]]:
    """The order in which one of many forwards side by side is always of the request that came first.

    It leads all of the first level, unless it runs already. So the largest ones get on while small ones come.

    :param started: all that have begun.
    :param running: those of which something runs.
    """
    oldest = min(started, key=lambda request: (request.arrived_at, request.number))
    if oldest.id in running or (ordered[0][0], oldest) not in ordered:
        return ordered
    first = (ordered[0][0], oldest)
    return [first, *(each for each in ordered if each != first)]


def _classes(requests: Sequence[Tracked], now: float, ahead_s: float, tick_s: float) -> tuple[list[Tracked], ...]:
    """Those whose deadlines press, by deadline; the plain ones; the hopeless ones."""
    hopeless = {id(request) for request in requests if _is_hopeless(request, now)}
    pressing = _pressing([request for request in requests if id(request) not in hopeless], now, ahead_s, tick_s)
    first = {id(request) for request in pressing}
    return (
        pressing,
        [request for request in requests if id(request) not in hopeless | first],
        [request for request in requests if id(request) in hopeless],
    )


def _is_hopeless(request: Tracked, now: float) -> bool:
    if request.deadline_at is None or request.demand.deadline_s is None:
        return False
    is_late = now + (request.remaining_s or 0.0) > request.deadline_at
    return is_late and now < request.deadline_at + request.demand.deadline_s


def _pressing(requests: Sequence[Tracked], now: float, ahead_s: float, tick_s: float) -> list[Tracked]:
    """Those that must run now so that as many as possible meet their deadlines, by deadline.

    Where not all can, those that take longest give way.
    Source: Moore, An n job, one machine sequencing algorithm for minimizing the number of late jobs, 1968.

    :param ahead_s: work that goes before all of them.
    """
    dated = [(r.deadline_at, r.number, r) for r in requests if r.deadline_at is not None and now < r.deadline_at]
    kept: list[tuple[float, int, Tracked]] = []
    total_s = ahead_s
    for deadline_at, number, request in sorted(dated):
        heapq.heappush(kept, (-(request.remaining_s or 0.0), number, request))
        total_s += request.remaining_s or 0.0
        if total_s > deadline_at - now:
            total_s += heapq.heappop(kept)[0]
    done_s, num_pressing = ahead_s, 0
    by_deadline = sorted((r.deadline_at, r.number, r) for _, _, r in kept if r.deadline_at is not None)
    for index, (deadline_at, _, request) in enumerate(by_deadline):
        done_s += request.remaining_s or 0.0
        if MARGIN * done_s + 2 * tick_s >= deadline_at - now:
            num_pressing = index + 1
    return [request for _, _, request in by_deadline[:num_pressing]]
