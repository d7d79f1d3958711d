"""Who runs next: a pure, synchronous object without I/O. Times are seconds on the caller's clock.

Shortest remaining time first, with ageing; calls join a batch only where everybody together gains.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

from sgld.engine.cost import Cost
from sgld.errors import QueueFull
from sgld.messages import CallInfo

# A second of waiting counts like half a second less to do: a request with R seconds to do is overtaken for 2·R at most.
AGEING = 0.5
# The front has a say again after this time: new requests wait for a standing order no longer.
STANDING_ORDER_S = 0.25


@dataclass(frozen=True)
class Batch:
    """Calls that run as one forward, and their followers, `num_ticks` times in all."""

    call_ids: tuple[int, ...]
    request_ids: tuple[str, ...]
    num_ticks: int
    predicted_s: float | None
    """Seconds of one tick."""


@dataclass
class _Running:
    arrived_at: float
    number: int
    """In the order of arrival; some arrive at the same time."""
    calls: dict[int, CallInfo] = field(default_factory=dict)
    num_denoise_calls: int = 0
    num_steps_done: int = 0
    last_denoise: CallInfo | None = None
    service_s: float = 0.0


class Scheduler:
    """Requests wait in order of arrival until they are admitted; then their calls compete.

    :param cost: predicts forwards; learned by the owner.
    """

    def __init__(
        self, cost: Cost, *, max_running_requests: int = 32, max_queued_requests: int = 1024, max_batch_size: int = 16
    ) -> None:
        self._cost = cost
        self._max_running = max_running_requests
        self._max_queued = max_queued_requests
        self._max_batch_size = max_batch_size
        self._queued: OrderedDict[str, tuple[float, int]] = OrderedDict()
        """When each arrived, and its number."""
        self._numbers = count()
        self._running: dict[str, _Running] = {}
        self._suspects: set[str] = set()
        """They share no forward: if one of them is lost again, it is known whose it was."""
        self._tail_s: dict[str, float] = {}
        """Cost key of the denoiser to the seconds that decoding takes afterwards."""
        self._mean_service_s: float | None = None

    def check_room(self, num_requests: int) -> None:
        """See that so many more requests may wait.

        :raises QueueFull: too many wait already.
        """
        num_free = max(self._max_running - len(self._running), 0)
        if len(self._queued) + num_requests > self._max_queued + num_free:
            raise QueueFull(
                f"{len(self._queued)} requests wait and {num_requests} more would exceed the limit of "
                f"{self._max_queued}; try again later"
            )

    def add(self, request_id: str, now: float) -> None:
        """Let a request wait."""
        self._queued[request_id] = now, next(self._numbers)

    def admit(self) -> list[str]:
        """The requests that start now, in order; from here on they are running."""
        admitted = []
        while self._queued and len(self._running) < self._max_running:
            request_id, arrival = self._queued.popitem(last=False)
            self._running[request_id] = _Running(*arrival)
            admitted.append(request_id)
        return admitted

    def pending(self, call: CallInfo) -> None:
        """A call of a running request waits; with a known id it replaces what was said before."""
        running = self._running.get(call.request_id)
        if running is None:
            return
        if call.id not in running.calls and call.kind == "denoise":
            running.num_denoise_calls += 1
            running.last_denoise = call
        running.calls[call.id] = call

    def stepped(self, request_id: str, step: int) -> None:
        """A running request has done so many steps."""
        if request_id in self._running:
            self._running[request_id].num_steps_done = step

    def ran(self, call_ids: Iterable[int], elapsed_s: float) -> None:
        """These calls ran in one forward."""
        done = set(call_ids)
        for running in self._running.values():
            for call_id in done & running.calls.keys():
                call = running.calls.pop(call_id)
                running.service_s += elapsed_s
                if call.kind == "decode" and running.last_denoise is not None:
                    self._tail_s[running.last_denoise.cost_key] = elapsed_s

    def remove(self, request_id: str, *, is_completed: bool = False) -> None:
        """A request ended or was cancelled."""
        self._queued.pop(request_id, None)
        self._suspects.discard(request_id)
        running = self._running.pop(request_id, None)
        if running is not None and is_completed:
            mean = self._mean_service_s
            self._mean_service_s = running.service_s if mean is None else 0.8 * mean + 0.2 * running.service_s

    def requeue(self, request_id: str, *, is_suspect: bool = False) -> None:
        """A running request starts again from the beginning, before those that arrived after it.

        :param is_suspect: it may be the one that cost a rank; from now on its calls share no forward.
        """
        if is_suspect:
            self._suspects.add(request_id)
        running = self._running.pop(request_id)
        self._queued[request_id] = running.arrived_at, running.number
        self._queued = OrderedDict(sorted(self._queued.items(), key=lambda item: item[1]))

    def next_batch(self, now: float) -> Batch | None:
        """The calls that run next, or None when nothing is pending."""
        waiting = sorted(self._pending_calls(), key=lambda call: (self._urgency_s(call, now), call.id))
        if not waiting:
            return None
        head = waiting[0]
        group = [call for call in waiting if call is head or self._may_join(head, call)]
        calls = self._as_many_as_pay(group[: self._max_batch_size], len(waiting))
        predicted_s = self._cost.predict(head.cost_key, sum(call.rows for call in calls))
        return Batch(
            call_ids=tuple(call.id for call in calls),
            request_ids=tuple(call.request_id for call in calls),
            num_ticks=self._num_ticks(calls, predicted_s),
            predicted_s=predicted_s,
        )

    def position(self, request_id: str) -> int:
        """How many waiting requests are before this one."""
        return list(self._queued).index(request_id)

    def eta_s(self, request_id: str) -> float | None:
        """Predicted seconds until the request is completed, all others considered; None while nothing is known."""
        own_s = self._remaining_of(request_id)
        if own_s is None:
            return None
        others = [self._remaining_of(other) for other in (*self._running, *self._queued) if other != request_id]
        return own_s + sum(min(other_s, own_s) for other_s in others if other_s is not None)

    def _pending_calls(self) -> list[CallInfo]:
        return [call for running in self._running.values() for call in running.calls.values()]

    def _urgency_s(self, call: CallInfo, now: float) -> float:
        """Remaining seconds minus the credit for waiting; the least goes first. What isn't known is tried."""
        remaining_s = self._remaining_s(self._running[call.request_id]) or 0.0
        return remaining_s - AGEING * (now - self._running[call.request_id].arrived_at)

    def _remaining_of(self, request_id: str) -> float | None:
        running = self._running.get(request_id)
        remaining_s = self._remaining_s(running) if running is not None else None
        return self._mean_service_s if remaining_s is None else remaining_s

    def _remaining_s(self, running: _Running) -> float | None:
        """Steps left at the cost of a step, and decoding."""
        call = running.last_denoise
        call_s = self._cost.predict(call.cost_key, call.rows) if call is not None else None
        if call is None or call_s is None:
            return None
        calls_per_step = math.ceil(running.num_denoise_calls / (running.num_steps_done + 1))
        num_steps_left = max(call.num_steps - running.num_steps_done, 0)
        return num_steps_left * calls_per_step * call_s + self._tail_s.get(call.cost_key, 0.0)

    def _may_join(self, head: CallInfo, call: CallInfo) -> bool:
        is_own = head.request_id == call.request_id
        if not is_own and not self._suspects.isdisjoint((head.request_id, call.request_id)):
            return False
        return call.merge_key is not None and call.merge_key == head.merge_key

    def _as_many_as_pay(self, group: Sequence[CallInfo], num_waiting: int) -> list[CallInfo]:
        """One more call joins n calls if the delay it costs them, n·Δt, is less than it saves those who wait.

        They would wait for its forward alone instead: t(1) - Δt less, each.
        """
        batch = [group[0]]
        rows = group[0].rows
        for call in group[1:]:
            before_s = self._cost.predict(call.cost_key, rows)
            after_s = self._cost.predict(call.cost_key, rows + call.rows)
            alone_s = self._cost.predict(call.cost_key, call.rows)
            if before_s is not None and after_s is not None and alone_s is not None:
                delta_s = after_s - before_s
                if len(batch) * delta_s >= (num_waiting - len(batch)) * (alone_s - delta_s):
                    break
            batch.append(call)
            rows += call.rows
        return batch

    def _num_ticks(self, calls: Sequence[CallInfo], predicted_s: float | None) -> int:
        """One when others wait; else as many as fit in the time for which new requests may wait."""
        if predicted_s is None or len(calls) < len(self._running) or self._queued:
            return 1
        return max(1, int(STANDING_ORDER_S / max(predicted_s, 1e-4)))
