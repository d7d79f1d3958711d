"""What holds of the scheduler for any requests at any time, on a clock of its own."""

from dataclasses import dataclass, field
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.calls import LinearCost, batch_of, call
from sgld.engine.cost import Cost, CostModel
from sgld.engine.demand import Demand
from sgld.engine.order import AGEING
from sgld.engine.scheduler import Batch, Scheduler
from sgld.messages import CallInfo, CallKind


@dataclass
class Simulated:
    """A request with `num_steps` steps of `width` calls each, all pending at once."""

    request_id: str
    arrives_at: float
    num_steps: int
    merge_key: str | None = None
    width: int = 1
    demand: Demand = field(default_factory=Demand)
    cancelled_after: int | None = None
    """Of its calls."""
    step: int = 0
    waiting: dict[int, CallInfo] = field(default_factory=dict)
    num_ran: int = 0
    finished_at: float | None = None

    def next_calls(self) -> list[CallInfo]:
        infos = [
            call(self.request_id, num_steps=self.num_steps, step=self.step, merge_key=self.merge_key)
            for _ in range(self.width)
        ]
        self.waiting = {info.id: info for info in infos}
        return infos


@dataclass
class Device:
    """Runs what the scheduler decides, and sees that it is right."""

    scheduler: Scheduler
    cost: LinearCost
    model: CostModel | None = None
    max_batch_size: int = 16
    now: float = 0.0
    order: list[str] = field(default_factory=list)
    """The request of each call, as they ran."""

    def run(self, requests: list[Simulated]) -> None:
        """Until all have ended, which takes finitely many batches."""
        coming = sorted(requests, key=lambda request: request.arrives_at)
        by_id = {request.request_id: request for request in requests}
        while any(request.finished_at is None for request in requests):
            while coming and coming[0].arrives_at <= self.now:
                request = coming.pop(0)
                self.scheduler.add(request.request_id, request.arrives_at, request.demand)
            for request_id in self.scheduler.admit(self.now):
                self._announce(by_id[request_id])
            batch = self.scheduler.next_batch(self.now)
            if batch is None:
                assert coming, "calls are pending, and nothing runs"
                self.now = coming[0].arrives_at
                continue
            self._forward(batch, [by_id[request_id] for request_id in batch.request_ids])

    def _announce(self, request: Simulated) -> None:
        for info in request.next_calls():
            self.scheduler.pending(info)

    def _forward(self, batch: Batch, requests: list[Simulated]) -> None:
        waiting = {call_id: info for request in requests for call_id, info in request.waiting.items()}
        calls = [waiting[call_id] for call_id in batch.call_ids]  # each waits, hence none runs twice
        assert len(calls) == len(set(batch.call_ids)) <= self.max_batch_size
        keys = {info.merge_key for info in calls}
        assert len(keys) == 1
        assert len(calls) == 1 or keys != {None}
        assert {info.request_id for info in calls} == set(batch.request_ids)
        elapsed_s = self.cost.fixed_s + self.cost.row_s * len(calls)
        self.now += elapsed_s
        self.order += [info.request_id for info in calls]
        self.scheduler.ran(batch.call_ids, elapsed_s)
        if self.model is not None:
            self.model.observe("c", len(calls), elapsed_s)
        for request in requests:
            self._advance(request, set(batch.call_ids))

    def _advance(self, request: Simulated, ran: set[int]) -> None:
        request.num_ran += len(request.waiting.keys() & ran)
        request.waiting = {call_id: info for call_id, info in request.waiting.items() if call_id not in ran}
        if request.cancelled_after is not None and request.num_ran >= request.cancelled_after:
            request.finished_at = self.now
            self.scheduler.remove(request.request_id)
        elif not request.waiting:
            request.step += 1
            self.scheduler.stepped(request.request_id, request.step)
            if request.step < request.num_steps:
                self._announce(request)
            else:
                request.finished_at = self.now
                self.scheduler.remove(request.request_id, is_completed=True)


DEMANDS = st.builds(
    Demand,
    priority=st.integers(-1, 1),
    deadline_s=st.none() | st.floats(0.1, 60),
    like=st.sampled_from("abc"),
    work=st.none() | st.floats(1, 100),
)
REQUESTS = st.builds(
    Simulated,
    request_id=st.just(""),
    arrives_at=st.floats(0, 30),
    num_steps=st.integers(1, 10),
    merge_key=st.sampled_from([None, "m", "n"]),
    width=st.integers(1, 3),
    demand=DEMANDS,
    cancelled_after=st.none() | st.integers(1, 10),
)
COSTS = st.builds(LinearCost, fixed_s=st.floats(0, 2), row_s=st.floats(0.01, 2))


def named(requests: list[Simulated]) -> list[Simulated]:
    for index, request in enumerate(requests):
        request.request_id = str(index)
    return requests


@given(
    st.lists(REQUESTS, min_size=1, max_size=10).map(named), COSTS, st.integers(1, 8), st.integers(1, 8), st.booleans()
)
def test_every_call_runs_exactly_once_and_every_request_ends(
    requests: list[Simulated], cost: LinearCost, max_batch_size: int, max_running: int, is_learned: bool
) -> None:
    model = CostModel() if is_learned else None
    scheduler = Scheduler(model or cost, max_batch_size=max_batch_size, max_running_requests=max_running)
    device = Device(scheduler, cost, model, max_batch_size)
    device.run(requests)
    for request in requests:
        num_ran = device.order.count(request.request_id)
        if request.cancelled_after is None:
            assert num_ran == request.num_steps * request.width
        else:
            assert num_ran <= request.num_steps * request.width
    assert scheduler.next_batch(device.now) is None


@settings(max_examples=25)
@given(
    num_steps=st.integers(2, 6),
    small_steps=st.integers(1, 3),
    load=st.floats(0.2, 1.5),
    merge_key=st.sampled_from([None, "m"]),
    deadline_s=st.none() | st.floats(1, 100),
)
def test_large_request_is_overtaken_only_by_those_that_came_soon_after_it(
    num_steps: int, small_steps: int, load: float, merge_key: str | None, deadline_s: float | None
) -> None:
    """R seconds of work wait at most for the requests of the next R / AGEING seconds, however many come later.

    Who misses a deadline is at the back only as long as that lasts once more.
    """
    large_s, small_s = float(num_steps), float(small_steps)
    bound_s = max((large_s - small_s) / AGEING, 2 * (deadline_s or 0.0), 0.0)
    last_s = bound_s + 20 + 3 * large_s
    large = Simulated("large", 0.0, num_steps, merge_key, demand=Demand(deadline_s=deadline_s))
    smalls = [
        Simulated(f"small{index}", index * small_s / load, small_steps, merge_key)
        for index in range(int(last_s * load / small_s) + 1)
    ]
    cost = LinearCost()
    # All may run: the order of admission is not what is tested.
    device = Device(Scheduler(cost, max_running_requests=10_000), cost)
    device.run([large, *smalls])
    assert large.finished_at is not None
    overtaking_s = sum(small_s for small in smalls if small.arrives_at <= bound_s)
    assert large.finished_at <= large_s + overtaking_s + small_s + 1


@settings(max_examples=25)
@given(
    num_steps=st.integers(2, 6),
    small_steps=st.integers(1, 3),
    load=st.floats(0.2, 1.2),
    max_running=st.integers(1, 3),
)
def test_large_request_is_admitted_in_the_end(num_steps: int, small_steps: int, load: float, max_running: int) -> None:
    """The same while it waits to be admitted, and those like it are known."""
    large_s, small_s = float(num_steps), float(small_steps)
    bound_s = max((large_s - small_s) / AGEING, 0.0)
    taught = [
        Simulated("one large", 0.0, num_steps, demand=Demand(like="large")),
        Simulated("one small", 0.0, small_steps, demand=Demand(like="small")),
    ]
    start = large_s + small_s
    large = Simulated("large", start, num_steps, demand=Demand(like="large"))
    smalls = [
        Simulated(f"small{i}", start + i * small_s / load, small_steps, demand=Demand(like="small"))
        for i in range(int((bound_s + 20 + 3 * large_s) * load / small_s) + 1)
    ]
    cost = LinearCost()
    device = Device(Scheduler(cost, max_running_requests=max_running), cost)
    device.run([*taught, large, *smalls])
    assert large.finished_at is not None
    overtaking_s = sum(small_s for small in smalls if small.arrives_at <= start + bound_s)
    # Those that run when it arrives may be overtaken, but aren't sent away.
    assert large.finished_at <= start + large_s + overtaking_s + (max_running + 1) * small_s + 1


@given(st.lists(REQUESTS, min_size=2, max_size=8).map(named), COSTS)
def test_lower_priorities_change_nothing_for_higher_ones(requests: list[Simulated], cost: LinearCost) -> None:
    """Beyond the tick that runs when the first of them arrives."""
    for request in requests:
        request.demand, request.cancelled_after, request.arrives_at = (
            Demand(priority=int(request.request_id) % 2),
            None,
            0,
        )
    ends = []
    for present in ([r for r in requests if r.demand.priority], requests):
        copies = [
            Simulated(r.request_id, 0.0, r.num_steps, r.merge_key, width=r.width, demand=r.demand) for r in present
        ]
        # More that wait make more rows pay; without merging nothing depends on them.
        device = Device(Scheduler(cost, max_batch_size=1), cost, max_batch_size=1)
        device.run(copies)
        ends.append({r.request_id: r.finished_at for r in copies if r.demand.priority})
    assert ends[0] == ends[1]


class AnyOrderOfEvents(RuleBasedStateMachine):
    """The engine's events in any order it may have: what is pending is always offered, and only that."""

    @initialize(max_running=st.integers(1, 4), max_batch_size=st.integers(1, 4), cost=st.sampled_from([0.0, 0.5, None]))
    def open(self, max_running: int, max_batch_size: int, cost: float | None) -> None:
        self.model = CostModel() if cost is None else None
        known: Cost = self.model or LinearCost(fixed_s=1 - (cost or 0.0), row_s=cost or 0.0)
        self.max_running, self.max_batch_size = max_running, max_batch_size
        self.scheduler = Scheduler(known, max_running_requests=max_running, max_batch_size=max_batch_size)
        self.now = 0.0
        self.queued: set[str] = set()
        self.running: dict[str, dict[int, CallInfo]] = {}
        self.suspects: set[str] = set()
        self.names = count(1)

    @rule(wait_s=st.floats(0.01, 5), demand=DEMANDS)
    def add(self, wait_s: float, demand: Demand) -> None:
        self.now += wait_s
        name = str(next(self.names))
        self.scheduler.add(name, self.now, demand)
        self.queued.add(name)

    @rule()
    def admit(self) -> None:
        order = sorted(self.queued, key=lambda name: self.scheduler.position(name, self.now))
        admitted = self.scheduler.admit(self.now)
        assert admitted == order[: self.max_running - len(self.running)]
        self.queued -= set(admitted)
        self.running |= {name: {} for name in admitted}

    @precondition(lambda self: self.running)
    @rule(
        data=st.data(),
        merge_key=st.sampled_from([None, "m", "n"]),
        kind=st.sampled_from(["encode", "denoise", "decode"]),
        num_steps=st.sampled_from([0, 10]),
    )
    def announce(self, data: st.DataObject, merge_key: str | None, kind: CallKind, num_steps: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        info = call(name, merge_key=merge_key, kind=kind, num_steps=num_steps)
        self.running[name][info.id] = info
        self.scheduler.pending(info)

    @precondition(lambda self: any(self.running.values()))
    @rule(elapsed_s=st.floats(0.01, 5), num_lost=st.integers(0, 1))
    def run_batch(self, elapsed_s: float, num_lost: int) -> None:
        batch = batch_of(self.scheduler, self.now)
        self.now += elapsed_s
        done = batch.call_ids[num_lost:]
        self.scheduler.ran(done, elapsed_s)
        if self.model is not None:
            self.model.observe("c", len(batch.call_ids), elapsed_s)
        for calls in self.running.values():
            for call_id in calls.keys() & set(done):
                del calls[call_id]

    @precondition(lambda self: self.running)
    @rule(data=st.data(), step=st.integers(0, 12))
    def step(self, data: st.DataObject, step: int) -> None:
        self.scheduler.stepped(data.draw(st.sampled_from(sorted(self.running))), step)

    @precondition(lambda self: self.queued or self.running)
    @rule(data=st.data(), is_completed=st.booleans())
    def remove(self, data: st.DataObject, is_completed: bool) -> None:
        name = data.draw(st.sampled_from(sorted([*self.queued, *self.running])))
        self.scheduler.remove(name, is_completed=is_completed)
        self.queued.discard(name)
        self.running.pop(name, None)
        self.suspects.discard(name)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def lose_rank(self, data: st.DataObject) -> None:
        suspects = data.draw(st.sets(st.sampled_from(sorted(self.running))))
        for name in self.running:
            self.scheduler.requeue(name, is_suspect=name in suspects)
        self.suspects |= suspects
        self.queued |= self.running.keys()
        self.running = {}

    @invariant()
    def everyone_who_waits_has_a_place(self) -> None:
        places = sorted(self.scheduler.position(name, self.now) for name in self.queued)
        assert places == list(range(len(self.queued)))

    @invariant()
    def next_batch_is_of_what_is_pending(self) -> None:
        pending = {call_id: info for calls in self.running.values() for call_id, info in calls.items()}
        batch = self.scheduler.next_batch(self.now)
        assert (batch is None) == (not pending)
        if batch is None:
            return
        calls = [pending[call_id] for call_id in batch.call_ids]
        assert batch.request_ids == tuple(dict.fromkeys(info.request_id for info in calls))
        assert len(set(batch.call_ids)) == len(batch.call_ids) <= self.max_batch_size
        keys = {info.merge_key for info in calls}
        assert len(keys) == 1
        assert len(calls) == 1 or None not in keys
        assert len(batch.request_ids) == 1 or self.suspects.isdisjoint(batch.request_ids)
        assert batch.num_ticks >= 1
        if self.queued or len(batch.request_ids) < len(self.running) or len(calls) < len(pending):
            assert batch.num_ticks == 1

    @invariant()
    def etas_are_sensible(self) -> None:
        for name in [*self.queued, *self.running]:
            eta_s = self.scheduler.eta_s(name, self.now)
            assert eta_s is None or eta_s >= 0


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
