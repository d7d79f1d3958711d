"""What holds of the scheduler of ranks that run forwards side by side, for any requests at any time."""

import heapq
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.calls import call
from sgld.engine.cost import CostModel, at_degree
from sgld.engine.demand import Demand
from sgld.engine.scheduler import Batch, Scheduler
from sgld.messages import CallInfo


@dataclass
class Simulated:
    """A request: a step that only the first rank can run, then others. `step_s`: of one call on one rank."""

    name: str
    arrives_at: float
    num_steps: int
    step_s: float
    width: int = 1
    max_degree: int = 4
    merge_key: str | None = None
    is_suspect: bool = False
    step: int = 0
    waiting: dict[int, CallInfo] = field(default_factory=dict)
    finished_at: float | None = None

    def next_calls(self) -> list[CallInfo]:
        is_first = self.step == 0
        infos = [
            call(
                self.name,
                num_steps=self.num_steps,
                step=self.step,
                cost_key=f"c{self.step_s:g}",
                merge_key=None if is_first else self.merge_key and f"{self.merge_key} {self.step_s:g}",
                kind="encode" if is_first else "denoise",
                is_bound=is_first,
                max_degree=1 if is_first else self.max_degree,
            )
            for _ in range(1 if is_first else self.width)
        ]
        self.waiting = {info.id: info for info in infos}
        return infos


@dataclass
class Ranks:
    """Runs what the scheduler decides, and sees that it is right."""

    num: int
    gain: float
    """Of twice the ranks."""
    max_running: int = 8
    now: float = 0.0
    running: dict[int, tuple[float, Batch, list[CallInfo]]] = field(default_factory=dict)
    """By the first rank: when it ends."""
    num_ran: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cost = CostModel()
        self.scheduler = Scheduler(
            self.cost, num_ranks=self.num, max_batch_size=4, max_running_requests=self.max_running
        )

    def run(self, requests: list[Simulated]) -> None:
        coming = [(request.arrives_at, index, request) for index, request in enumerate(requests)]
        heapq.heapify(coming)
        self.by_name = {request.name: request for request in requests}
        while coming or self.scheduler._running or self.scheduler._queued:
            while coming and coming[0][0] <= self.now:
                self._arrives(heapq.heappop(coming)[2])
            for name in self.scheduler.admit(self.now):
                for info in self.by_name[name].next_calls():
                    self.scheduler.pending(info)
            while (batch := self.scheduler.next_batch(self.now, [b for _, b, _ in self.running.values()])) is not None:
                self._begin(batch)
            self._see_that_nobody_waits_for_nothing()
            ends = [ends_at for ends_at, _, _ in self.running.values()] + [at for at, _, _ in coming[:1]]
            assert ends, "calls are pending, and nothing runs"
            self.now = max(min(ends), self.now)
            for first in [first for first, (ends_at, _, _) in self.running.items() if ends_at <= self.now]:
                self._end(*self.running.pop(first))

    def _arrives(self, request: Simulated) -> None:
        self.scheduler.add(request.name, request.arrives_at, Demand(like=f"{request.step_s:g} {request.num_steps}"))
        if request.is_suspect:
            self.scheduler._queued[request.name].is_suspect = True

    def _begin(self, batch: Batch) -> None:
        ranks = batch.ranks
        assert ranks.first % ranks.num == 0
        assert ranks.first + ranks.num <= self.num
        busy = {rank for _, other, _ in self.running.values() for rank in other.ranks.every}
        assert busy.isdisjoint(ranks.every)
        waiting = {key: info for name in batch.request_ids for key, info in self.by_name[name].waiting.items()}
        calls = [waiting[call_id] for call_id in batch.call_ids]
        given_ids = {info.id for _, _, others in self.running.values() for info in others}
        assert given_ids.isdisjoint(batch.call_ids)
        assert all(ranks.num <= info.max_degree and (not info.is_bound or ranks.first == 0) for info in calls)
        assert len(calls) == 1 or {info.merge_key for info in calls} == {calls[0].merge_key} != {None}
        is_suspect = any(self.by_name[info.request_id].is_suspect for info in calls)
        assert not is_suspect or (len(batch.request_ids) == 1 and not self.running)
        step_s = self.by_name[calls[0].request_id].step_s
        elapsed_s = step_s * len(calls) / (1 + self.gain * (ranks.num - 1))
        self.running[ranks.first] = self.now + elapsed_s, batch, calls

    def _see_that_nobody_waits_for_nothing(self) -> None:
        if any(self.by_name[name].is_suspect for name in self.scheduler._running):
            return
        busy = {rank for _, batch, _ in self.running.values() for rank in batch.ranks.every}
        given_ids = {info.id for _, _, calls in self.running.values() for info in calls}
        for request in (self.by_name[name] for name in self.scheduler._running):
            for info in request.waiting.values():
                if info.id not in given_ids:
                    assert 0 in busy if info.is_bound else len(busy) == self.num

    def _end(self, ended_at: float, batch: Batch, calls: list[CallInfo]) -> None:
        step_s = self.by_name[calls[0].request_id].step_s
        elapsed_s = step_s * len(calls) / (1 + self.gain * (batch.ranks.num - 1))
        self.cost.observe(at_degree(calls[0].cost_key, batch.ranks.num), len(calls), elapsed_s)
        self.scheduler.ran(batch.call_ids, elapsed_s)
        for info in calls:
            self.num_ran[info.id] = self.num_ran.get(info.id, 0) + 1
            self._goes_on(self.by_name[info.request_id], info)

    def _goes_on(self, request: Simulated, info: CallInfo) -> None:
        del request.waiting[info.id]
        if request.waiting:
            return
        request.step += 1
        if request.step > 1:
            self.scheduler.stepped(request.name, request.step - 1)
        if request.step <= request.num_steps:
            for following in request.next_calls():
                self.scheduler.pending(following)
        else:
            request.finished_at = self.now
            self.scheduler.remove(request.name, is_completed=True)


REQUESTS = st.builds(
    Simulated,
    name=st.just(""),
    arrives_at=st.floats(0, 20),
    num_steps=st.integers(1, 6),
    step_s=st.sampled_from([0.25, 1.0, 4.0]),
    width=st.integers(1, 2),
    max_degree=st.sampled_from([1, 2, 4]),
    merge_key=st.sampled_from([None, "m"]),
    is_suspect=st.integers(0, 9).map(lambda n: n == 0),
)


def named(requests: list[Simulated]) -> list[Simulated]:
    for index, request in enumerate(requests):
        request.name = str(index)
    return requests


@settings(max_examples=50)
@given(
    st.lists(REQUESTS, min_size=1, max_size=8).map(named),
    st.sampled_from([2, 4]),
    st.floats(-0.3, 1.0),
    st.integers(1, 8),
)
def test_each_call_runs_once_on_ranks_of_its_own_and_none_that_could_run_waits(
    requests: list[Simulated], num_ranks: int, gain: float, max_running: int
) -> None:
    ranks = Ranks(num_ranks, gain, max_running)
    ranks.run(requests)
    assert set(ranks.num_ran.values()) == {1}
    assert len(ranks.num_ran) == sum(1 + request.num_steps * request.width for request in requests)


@settings(max_examples=5)
@given(st.sampled_from([2, 4]), st.floats(0.3, 1.0))
def test_large_request_is_not_starved(num_ranks: int, gain: float) -> None:
    """Small ones come for ever, more than the ranks can do."""
    small = [Simulated(str(n), arrives_at=n, num_steps=2, step_s=0.5 * num_ranks) for n in range(150)]
    large = Simulated("large", arrives_at=1.0, num_steps=2, step_s=3.0)
    ranks = Ranks(num_ranks, gain, max_running=150)
    ranks.run([large, *small])
    assert large.finished_at is not None
    assert large.finished_at < 150.0, "before the last of them came"


@settings(max_examples=5)
@given(st.floats(0.0, 1.0))
def test_who_came_first_has_one_of_four_ranks(gain: float) -> None:
    """However many small ones come: it waits for the end of one of their forwards before each of its own at most."""
    known = [Simulated(name, arrives_at=0.0, num_steps=4, step_s=step_s) for name, step_s in (("a", 1.0), ("b", 8.0))]
    small = [Simulated(str(n), arrives_at=50.0 + n / 2, num_steps=4, step_s=1.0) for n in range(150)]
    large = Simulated("large", arrives_at=50.0, num_steps=4, step_s=8.0)
    Ranks(4, gain, max_running=200).run([*known, large, *small])
    assert large.finished_at is not None
    assert large.finished_at <= 50.0 + 5 * (8.0 + 1.0)
