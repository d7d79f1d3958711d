"""Which of a replica's ranks run a forward, where several may run side by side: pure functions."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from sgld.engine.batching import as_many_as_pay
from sgld.engine.cost import Cost
from sgld.engine.order import Level
from sgld.engine.remaining import Tracked
from sgld.messages import CallInfo
from sgld.parallel import Ranks


@dataclass(frozen=True)
class Placed:
    """Calls that share a forward, and the ranks that run it."""

    calls: list[tuple[Tracked, CallInfo]]
    ranks: Ranks


def placed(
    ordered: Sequence[tuple[Level, Tracked]],
    given: Collection[int],
    busy: Iterable[Ranks],
    num_requests: int,
    cost: "Degrees",
    max_batch_size: int,
) -> Placed | None:
    """The next forward for ranks that have nothing to do; None: nothing that waits can run there.

    The first request in order goes first, with as many ranks as are good for all (`best_degree`), as many as are free,
    and as many as leave one to each other call of the same level that waits: several ranks do less work together than
    each for itself, so they are for times when there isn't enough to do. As long as others could run beside it, they
    don't join it. What only the first rank can run goes before all of the same priority whose deadlines don't press.

    :param ordered: the requests with calls that wait, the most urgent first.
    :param given: calls that run already.
    :param busy: ranks that run something.
    :param num_requests: all that wait or run.
    """
    blocks = free_blocks(busy, cost.num_ranks)
    waiting = [(level, request, call) for level, request in ordered for call in _waiting(request, given)]
    # The others can run elsewhere. Text is encoded soon so, and then there is more to choose from.
    waiting.sort(key=lambda each: (each[0], not each[2].is_bound))
    for place, (first_level, _, call) in enumerate(waiting):
        able = [block for block in blocks if block.first == 0 or not call.is_bound]
        if not able:
            continue
        largest = max(block.num for block in able)
        num_free = sum(block.num for block in blocks)
        beside = [other for level, _, other in waiting if level <= first_level]
        num_others = sum(blocks[0].first == 0 or not other.is_bound for other in beside) - 1
        degree = min(cost.best_degree(call, num_requests), largest, _power_of_two(num_free - num_others))
        ranks = _part_of(able, degree, is_bound=call.is_bound)
        num_alike = sum(other.merge_key == call.merge_key for _, _, other in waiting)
        max_size = min(-(-num_alike // (num_free // degree)), max_batch_size)
        able_to = [each for each in waiting[place:] if _can_run(each[2], ranks)]
        return Placed(_sharing(able_to, num_requests, cost.at(degree), max_size), ranks)
    return None


def _power_of_two(most: int) -> int:
    """The largest one that isn't more, at least 1."""
    return 1 << (max(most, 1).bit_length() - 1)


def _waiting(request: Tracked, given: Collection[int]) -> list[CallInfo]:
    return [call for call_id, call in sorted(request.calls.items()) if call_id not in given]


def _can_run(call: CallInfo, ranks: Ranks) -> bool:
    return ranks.num <= call.max_degree and (ranks.first == 0 or not call.is_bound)


def _sharing(
    waiting: Sequence[tuple[Level, Tracked, CallInfo]],
    num_requests: int,
    cost: Cost,
    max_size: int,
) -> list[tuple[Tracked, CallInfo]]:
    """The first call, and those that everybody gains by if they join it."""
    first = waiting[0]
    if max_size == 1 or first[2].merge_key is None:
        return [first[1:]]
    ordered = list(dict.fromkeys((level, request) for level, request, _ in waiting))
    able = {call.id for _, _, call in waiting}
    return as_many_as_pay(ordered, num_requests, cost, max_size, able)


def free_blocks(busy: Iterable[Ranks], num_ranks: int) -> list[Ranks]:
    """The ranks that aren't busy, in the largest blocks that there are."""
    taken = {rank for ranks in busy for rank in ranks.every}

    def blocks(ranks: Ranks) -> list[Ranks]:
        if taken.isdisjoint(ranks.every):
            return [ranks]
        half = ranks.num // 2
        return blocks(Ranks(ranks.first, half)) + blocks(Ranks(ranks.first + half, half)) if half else []

    return blocks(Ranks(0, num_ranks))


def _part_of(blocks: Sequence[Ranks], num: int, *, is_bound: bool) -> Ranks:
    """So many ranks of the smallest block that has them; the last ones, as some calls need the first."""
    block = min((b for b in blocks if b.num >= num), key=lambda b: (b.num, -b.first))
    return Ranks(block.first if is_bound else block.first + block.num - num, num)


class Degrees:
    """Prices of forwards by the number of ranks that share them.

    :param num_ranks: of a replica, a power of two.
    """

    def __init__(self, cost: Cost, num_ranks: int) -> None:
        self._cost = cost
        self.num_ranks = num_ranks

    def at(self, degree: int) -> Cost:
        """The prices at one degree."""
        return _AtDegree(self._cost, degree)

    def best_degree(self, call: CallInfo, num_requests: int) -> int:
        """How many ranks should share a call's forward, where these have nothing to do.

        On d ranks it takes t(d). Meanwhile the other requests lack d of the ranks, so each is d/ranks·t(d) later. What
        isn't known is tried on one rank.

        :param num_requests: all that wait or run.
        """

        def price(degree: int) -> float | None:
            elapsed_s = self._cost.predict(call.cost_key, call.rows, degree)
            return None if elapsed_s is None else elapsed_s * (1 + (num_requests - 1) * degree / self.num_ranks)

        best, best_price, degree = 1, price(1), 1
        while best_price is not None and (degree := 2 * degree) <= min(call.max_degree, self.num_ranks):
            next_price = price(degree)
            if next_price is not None and next_price < best_price:
                best, best_price = degree, next_price
        return best


@dataclass(frozen=True)
class _AtDegree:
    cost: Cost
    degree: int

    @property
    def version(self) -> int:
        return self.cost.version

    def predict(self, key: str, rows: int, degree: int = 1) -> float | None:
        return self.cost.predict(key, rows, self.degree)

    def estimate(self, key: str, rows: int) -> float | None:
        return self.cost.estimate(key, rows)

    def share(self, key: str, num_ranks: int) -> float:
        return self.cost.share(key, num_ranks)
