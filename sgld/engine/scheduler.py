"""Who runs next: a pure, synchronous object without I/O. Times are seconds on the caller's clock.

Shortest remaining time first, with ageing, below priorities and deadlines; calls join a batch only where everybody
together gains.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from sgld.engine.batching import all_together, as_many_as_pay, preparing, together_s
from sgld.engine.cost import Cost
from sgld.engine.demand import Demand, Profiles
from sgld.engine.lanes import Degrees, placed
from sgld.engine.order import RANKS_BY_OLDEST, Level, in_order, oldest_first, score
from sgld.engine.remaining import Tracked
from sgld.errors import DeadlineImpossible, QueueFull
from sgld.messages import CallInfo
from sgld.parallel import FIRST, Ranks

# After this time it is asked again what is best for those that run together.
STANDING_ORDER_S = 0.25
# Predictions for clients needn't consider an order newer than this: to sort a thousand requests takes 2 ms.
ETA_ORDER_S = 0.1
# The longest tick of late is forgotten by so much with each tick.
_FORGET = 0.99


@dataclass(frozen=True)
class Batch:
    """Calls that run as one forward, and their followers, `num_ticks` times in all."""

    call_ids: tuple[int, ...]
    request_ids: tuple[str, ...]
    """The requests of the calls; one that has several calls in the batch comes once."""
    num_ticks: int
    predicted_s: float | None
    """Seconds of one tick."""
    ranks: Ranks = FIRST
    """Those that run it, where others run something else meanwhile."""


class Scheduler:
    """Requests wait in the order of service until they are admitted; then their calls compete.

    :param cost: predicts forwards; learned by the owner.
    :param profiles: what requests take; schedulers of one engine share it.
    :param num_ranks: so many forwards may run side by side, each on one rank; or fewer, on more of them.
    """

    def __init__(
        self,
        cost: Cost,
        profiles: Profiles | None = None,
        *,
        max_running_requests: int = 32,
        max_queued_requests: int = 1024,
        max_batch_size: int = 16,
        num_ranks: int = 1,
    ) -> None:
        self._cost = cost
        self._num_ranks = num_ranks
        self._degrees = Degrees(cost, num_ranks)
        self._profiles = profiles or Profiles(cost)
        self._max_running = max_running_requests
        self._max_queued = max_queued_requests
        self._max_batch_size = max_batch_size
        self.is_calibrating = False
        """Calls share forwards wherever they can, whether that pays or not: to find out whether it does."""
        self._queued: dict[str, Tracked] = {}
        self._running: dict[str, Tracked] = {}
        self._by_call: dict[int, Tracked] = {}
        """The running requests whose calls wait, by these."""
        self._scores: dict[str, float] = {}
        self._eta_order: tuple[float, list[tuple[Level, Tracked]]] | None = None
        """When it was made; None where it is to be made again."""
        self._numbers = count()
        self._tick_s = 0.0
        """The longest of late."""

    @property
    def num_queued(self) -> int:
        """Requests that haven't started."""
        return len(self._queued)

    def run_singly(self) -> None:
        """From now on one request starts when the last one has ended."""
        self._max_running = 1

    def check_room(self, demand: Demand, num_requests: int, now: float, *, beside: Sequence["Scheduler"] = ()) -> None:
        """See that so many more requests may wait, and can be done in time.

        :param beside: schedulers of the other replicas; the limit is one for all together.
        :raises QueueFull: too many wait already.
        :raises DeadlineImpossible: they take longer than they may.
        """
        every = (self, *beside)
        num_queued = sum(each.num_queued for each in every)
        num_free = sum(max(each._max_running - len(each._running), 0) for each in every)
        num_excess = num_queued + num_requests - self._max_queued - num_free
        if num_excess > 0:
            raise QueueFull(
                f"{num_queued} requests wait and {num_requests} more would exceed the limit of "
                f"{self._max_queued}; try again later",
                retry_after_s=self._until_free_s(num_excess, now),
            )
        total_s = self._profiles.known_s(demand)
        if demand.deadline_s is not None and total_s is not None and total_s > demand.deadline_s:
            raise DeadlineImpossible(
                f"deadline_s is {demand.deadline_s:g}, but such a request takes {total_s:.3g} s when nothing else "
                f"runs; allow it more time, or ask for less"
            )

    def add(self, request_id: str, now: float, demand: Demand | None = None) -> None:
        """Let a request wait."""
        self._queued[request_id] = Tracked(request_id, next(self._numbers), now, demand or Demand())
        self._eta_order = None

    def admit(self, now: float) -> list[str]:
        """The requests that start now, in order; from here on they are running."""
        num_free = self._max_running - len(self._running)
        if num_free <= 0 or not self._queued:
            return []
        admitted = [request for _, request in self._ordered(self._queued.values(), now)[:num_free]]
        for request in admitted:
            self._running[request.id] = self._queued.pop(request.id)
        return [request.id for request in admitted]

    def pending(self, call: CallInfo) -> None:
        """A call of a running request waits; with a known id it replaces what was said before."""
        request = self._running.get(call.request_id)
        if request is not None:
            request.pending(call)
            self._by_call[call.id] = request

    def stepped(self, request_id: str, step: int) -> None:
        """A running request has done so many steps."""
        if request_id in self._running:
            self._running[request_id].stepped(step)

    def processed(self, request_id: str, num_left: int) -> None:
        """A running request has its frames, which go through so many more calls."""
        if request_id in self._running:
            self._running[request_id].processed(num_left)

    def ran(self, call_ids: Iterable[int], elapsed_s: float) -> None:
        """These calls ran in one forward."""
        self._tick_s = max(elapsed_s, _FORGET * self._tick_s)
        self.launched(call_ids)

    def launched(self, call_ids: Iterable[int]) -> None:
        """These calls don't wait any more: the device has them, or is done with them."""
        for call_id in call_ids:
            request = self._by_call.pop(call_id, None)
            if request is not None:
                request.ran(call_id)

    def remove(self, request_id: str, *, is_completed: bool = False) -> None:
        """A request ended or was cancelled."""
        self._eta_order = None
        self._queued.pop(request_id, None)
        self._scores.pop(request_id, None)
        request = self._running.pop(request_id, None)
        if request is None:
            return
        self._forget_calls(request)
        if is_completed:
            self._profiles.learn(request.demand, request.made)

    def requeue(self, request_id: str, *, is_suspect: bool = False) -> None:
        """A running request starts again from the beginning.

        :param is_suspect: it may be the one that cost a rank; from now on its calls share no forward.
        """
        request = self._running.pop(request_id)
        self._forget_calls(request)
        request.restart()
        request.is_suspect |= is_suspect
        self._queued[request_id] = request

    def next_batch(self, now: float, running: Collection[Batch] = ()) -> Batch | None:
        """The calls that run next, or None when nothing is pending, or nothing that could run now.

        :param running: what ranks are busy with.
        """
        if not self._by_call:
            return None
        if self._num_ranks > 1:
            return self._next_placed(now, running)
        if running:
            return None
        waiting = [request for request in self._running.values() if request.calls]
        exclusive = [request for request in waiting if _is_exclusive(request)]
        ordered = self._ordered(exclusive or waiting, now)
        batch = self._batch(ordered)
        if self.is_calibrating:
            batch = all_together(exclusive or waiting, self._max_batch_size)
        elif len(batch) < min(self._max_batch_size, len(self._by_call)):
            place = preparing(ordered, batch, self._num_requests, self._cost, self._profiles)
            if place is not None:
                batch = self._batch([ordered.pop(place), *ordered])
        return self._order(batch)

    def _next_placed(self, now: float, running: Collection[Batch]) -> Batch | None:
        """The calls that run next beside others.

        A request that may have cost a rank, and one that changes components, runs when nothing else does.
        """
        given = {call_id for batch in running for call_id in batch.call_ids}
        # The calls that follow in a standing order are its own.
        standing = {name for batch in running if batch.num_ticks > 1 for name in batch.request_ids}
        waiting = [r for r in self._running.values() if r.calls.keys() - given and r.id not in standing]
        exclusive = [request for request in waiting if _is_exclusive(request)]
        ordered = self._ordered(exclusive or waiting, now)
        if not ordered or self._is_alone(running):
            return None
        if is_alone := bool(exclusive) or ordered[0][1].is_suspect:
            if running:
                return None
            ordered = ordered[:1]
        else:
            ordered = [(level, request) for level, request in ordered if not request.is_suspect]
        if self.is_calibrating and not running and not is_alone:
            batch = all_together([request for _, request in ordered], self._max_batch_size)
            degree = self._degrees.best_degree(batch[0][1], 1)
            return self._order(batch, Ranks(0, degree))
        if ordered and not is_alone and self._num_ranks >= RANKS_BY_OLDEST:
            names = {name for batch in running for name in batch.request_ids}
            ordered = oldest_first(ordered, self._running.values(), names)
        busy = [batch.ranks for batch in running]
        num = self._num_requests
        chosen = placed(ordered, given, busy, num, self._degrees, self._max_batch_size)
        return self._order(chosen.calls, chosen.ranks) if chosen is not None else None

    def _is_alone(self, running: Collection[Batch]) -> bool:
        """Whether one of those that run must have no company."""
        every = (self._running.get(name) for batch in running for name in batch.request_ids)
        return any(request.is_suspect or _is_exclusive(request) for request in every if request is not None)

    def _order(self, batch: Sequence[tuple[Tracked, CallInfo]], ranks: Ranks = FIRST) -> Batch:
        calls = [call for _, call in batch]
        predicted_s = self._cost.predict(calls[0].cost_key, sum(call.rows for call in calls), ranks.num)
        return Batch(
            call_ids=tuple(call.id for call in calls),
            request_ids=tuple(dict.fromkeys(request.id for request, _ in batch)),
            num_ticks=self._num_ticks(calls, predicted_s),
            predicted_s=predicted_s,
            ranks=ranks,
        )

    def position(self, request_id: str, now: float) -> int:
        """How many waiting requests are before this one."""
        return [request.id for _, request in self._ordered(self._queued.values(), now)].index(request_id)

    def eta_s(self, request_id: str, now: float) -> float | None:
        """Predicted seconds until the request is completed if no others come; None while nothing is known.

        All that goes before it is done first, and as long as it runs those that share its forwards make them longer.
        """
        request = self._running.get(request_id) or self._queued.get(request_id)
        if request is None:
            return None
        self._score(request)
        if (own_s := request.remaining_s) is None:
            return None
        ordered = self._all_in_order(now)
        place = next(i for i, (_, other) in enumerate(ordered) if other is request)
        before = [(other, other.remaining_s or 0.0) for _, other in ordered[: place + 1]]
        sharing = [other for other, _ in self._batch(ordered[place:])] if request.calls else []
        return together_s(
            before + [(other, min(other.remaining_s or 0.0, own_s)) for other in sharing[1:]],
            self._cost,
            self._max_batch_size,
            self._num_ranks,
        )

    def backlog_s(self, now: float) -> float | None:
        """Predicted seconds until all requests here are completed; None while nothing is known of one of them."""
        every = [(request, request.remaining_s) for _, request in self._all_in_order(now)]
        known = [(request, remaining_s) for request, remaining_s in every if remaining_s is not None]
        return (
            together_s(known, self._cost, self._max_batch_size, self._num_ranks) if len(known) == len(every) else None
        )

    def give_up(self, now: float, num_requests: int) -> list[Tracked]:
        """So many of the requests that start next leave for other schedulers; fewer where the others have started."""
        leaving = [request for _, request in self._ordered(self._queued.values(), now)[:num_requests]]
        for request in leaving:
            self.remove(request.id)
        return leaving

    def adopt(self, request: Tracked) -> None:
        """Let a request wait here that another scheduler gave up; it came when it came there."""
        self.add(request.id, request.arrived_at, request.demand)
        self._queued[request.id].is_suspect = request.is_suspect

    def _ordered(self, requests: Iterable[Tracked], now: float) -> list[tuple[Level, Tracked]]:
        return in_order([(request, self._score(request)) for request in requests], now, self._tick_s)

    def _all_in_order(self, now: float) -> list[tuple[Level, Tracked]]:
        """All requests, in an order of late."""
        if self._eta_order is None or not 0 <= now - self._eta_order[0] < ETA_ORDER_S:
            self._eta_order = now, self._ordered([*self._running.values(), *self._queued.values()], now)
        return self._eta_order[1]

    def _score(self, request: Tracked) -> float:
        if request.update(self._cost, self._profiles) or request.id not in self._scores:
            self._scores[request.id] = score(request, self._num_ranks)
        return self._scores[request.id]

    def _batch(self, ordered: Sequence[tuple[Level, Tracked]]) -> list[tuple[Tracked, CallInfo]]:
        return as_many_as_pay(ordered, self._num_requests, self._cost, self._max_batch_size)

    @property
    def _num_requests(self) -> int:
        return len(self._running) + len(self._queued)

    def _forget_calls(self, request: Tracked) -> None:
        for call_id in request.calls:
            del self._by_call[call_id]

    def _until_free_s(self, num_requests: int, now: float) -> float | None:
        """Seconds until so many of the requests here are completed; None while nothing is known."""
        ordered = self._all_in_order(now)
        first = [(request, request.remaining_s) for _, request in ordered[:num_requests]]
        known = [(request, remaining_s) for request, remaining_s in first if remaining_s is not None]
        return (
            together_s(known, self._cost, self._max_batch_size, self._num_ranks) if len(known) == num_requests else None
        )

    def _num_ticks(self, calls: Sequence[CallInfo], predicted_s: float | None) -> int:
        """How long the rank goes on without asking; a command ends that after the tick in which it comes.

        1. Others wait, or nothing is known of how long the call takes: one tick.
        2. Calls of several, or on one of several ranks: what is good for them may change with time and what is learned.
        3. One that is alone: nothing but a command could change what runs next, so up to its last step.
        """
        if predicted_s is None or self._queued or len({call.request_id for call in calls}) < len(self._running):
            return 1
        if len(calls) < len(self._by_call):
            return 1
        num_left = calls[0].num_steps - calls[0].step_index if len(calls) == self._num_ranks == 1 else 1
        return max(1, int(STANDING_ORDER_S / max(predicted_s, 1e-4)), num_left)


def _is_exclusive(request: Tracked) -> bool:
    return any(call.is_exclusive for call in request.calls.values())
