from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sgld.engine.cost import Cost, CostModel, FlatCost
from sgld.engine.scheduler import AGEING, STANDING_ORDER_S, Batch, Scheduler
from sgld.errors import QueueFull
from sgld.messages import CallInfo, CallKind

_ids = count(1)


@dataclass(frozen=True)
class LinearCost:
    """A forward takes `fixed_s` and `row_s` for each row; `by_key` says otherwise for some keys."""

    fixed_s: float = 0.0
    row_s: float = 1.0
    by_key: dict[str, float | None] = field(default_factory=dict)

    def predict(self, key: str, rows: int) -> float | None:
        if key in self.by_key:
            return self.by_key[key]
        return self.fixed_s + self.row_s * rows


def call(
    request_id: str,
    *,
    num_steps: int = 10,
    step: int = 0,
    merge_key: str | None = "m",
    cost_key: str = "c",
    kind: CallKind = "denoise",
    rows: int = 1,
) -> CallInfo:
    return CallInfo(
        id=next(_ids),
        request_id=request_id,
        kind=kind,
        component="transformer",
        merge_key=merge_key,
        cost_key=cost_key,
        rows=rows,
        step_index=step,
        num_steps=num_steps,
    )


def running(cost: Cost, *calls: CallInfo, max_batch_size: int = 16, max_running_requests: int = 32) -> Scheduler:
    """A scheduler whose requests, one for each call, arrived at time 0 in this order."""
    scheduler = Scheduler(cost, max_batch_size=max_batch_size, max_running_requests=max_running_requests)
    for info in calls:
        scheduler.add(info.request_id, 0.0)
    scheduler.admit()
    for info in calls:
        scheduler.pending(info)
    return scheduler


def batch_of(scheduler: Scheduler, now: float = 0.0) -> Batch:
    batch = scheduler.next_batch(now)
    assert batch is not None
    return batch


def test_nothing_runs_while_nothing_is_pending() -> None:
    scheduler = Scheduler(FlatCost())
    assert scheduler.next_batch(0.0) is None
    scheduler.add("a", 0.0)
    assert scheduler.next_batch(0.0) is None
    assert scheduler.admit() == ["a"]
    assert scheduler.next_batch(0.0) is None


def test_a_lone_call_runs() -> None:
    only = call("a")
    batch = batch_of(running(LinearCost(fixed_s=0.5, row_s=0.25), only))
    assert (batch.call_ids, batch.request_ids, batch.predicted_s) == ((only.id,), ("a",), 0.75)


def test_requests_are_admitted_in_order_up_to_the_limit() -> None:
    scheduler = Scheduler(FlatCost(), max_running_requests=2)
    for request_id in "abc":
        scheduler.add(request_id, 0.0)
    assert scheduler.admit() == ["a", "b"]
    assert scheduler.admit() == []
    scheduler.remove("a", is_completed=True)
    assert scheduler.admit() == ["c"]


def test_full_queue_refuses_and_says_the_limit() -> None:
    scheduler = Scheduler(FlatCost(), max_running_requests=1, max_queued_requests=2)
    scheduler.check_room(3)  # one of them runs at once
    for request_id in ("a", "b"):
        scheduler.add(request_id, 0.0)
    scheduler.admit()
    scheduler.check_room(1)
    with pytest.raises(QueueFull, match=r"1 requests wait and 2 more would exceed the limit of 2"):
        scheduler.check_room(2)
    scheduler.remove("b")
    scheduler.check_room(2)


def test_position_counts_those_that_wait_before() -> None:
    scheduler = Scheduler(FlatCost(), max_running_requests=1)
    for request_id in "abcd":
        scheduler.add(request_id, 0.0)
    scheduler.admit()
    assert [scheduler.position(request_id) for request_id in "bcd"] == [0, 1, 2]
    scheduler.remove("c")
    assert [scheduler.position(request_id) for request_id in "bd"] == [0, 1]


def test_least_remaining_time_runs_first() -> None:
    long, short = call("long", num_steps=50, merge_key=None), call("short", num_steps=5, merge_key=None)
    assert batch_of(running(LinearCost(), long, short)).call_ids == (short.id,)


def test_request_near_its_end_goes_before_a_shorter_one() -> None:
    long, short = call("long", num_steps=50, merge_key=None), call("short", num_steps=5, merge_key=None)
    scheduler = running(LinearCost(), long, short)
    scheduler.stepped("long", 48)
    assert batch_of(scheduler).call_ids == (long.id,)


def test_two_calls_in_each_step_count_twice() -> None:
    guided, plain = call("guided", num_steps=6, merge_key=None), call("plain", num_steps=10, merge_key=None)
    scheduler = running(LinearCost(), guided, plain)
    assert batch_of(scheduler).call_ids == (guided.id,)
    scheduler.ran([guided.id], 1.0)
    second = call("guided", num_steps=6, merge_key=None)
    scheduler.pending(second)
    assert batch_of(scheduler).call_ids == (plain.id,)


def test_decoding_is_part_of_the_remaining_time() -> None:
    done, slow_end = call("done", cost_key="heavy", merge_key=None), call("x", cost_key="light", merge_key=None)
    scheduler = running(LinearCost(by_key={"heavy": 1.0, "light": 1.0}), done)
    scheduler.ran([done.id], 1.0)
    decode = call("done", cost_key="decode", kind="decode", merge_key=None)
    scheduler.pending(decode)
    scheduler.ran([decode.id], 100.0)
    scheduler.remove("done", is_completed=True)
    again = call("again", num_steps=1, cost_key="heavy", merge_key=None)
    for info in (again, slow_end):
        scheduler.add(info.request_id, 0.0)
    scheduler.admit()
    scheduler.pending(again)
    scheduler.pending(slow_end)
    assert batch_of(scheduler).call_ids == (slow_end.id,)


def test_unknown_calls_are_tried_first() -> None:
    known, unknown = call("known", num_steps=1, merge_key=None), call("unknown", cost_key="new", merge_key=None)
    assert batch_of(running(LinearCost(by_key={"new": None}), known, unknown)).call_ids == (unknown.id,)


def test_waiting_outweighs_size_in_the_end() -> None:
    large = call("large", num_steps=100, merge_key=None)
    scheduler = running(LinearCost(), large)
    for now, expected in ((10.0, "small"), (100 / AGEING + 10, "large")):
        scheduler.add("small", now)
        scheduler.admit()
        scheduler.pending(call("small", num_steps=1, merge_key=None))
        assert batch_of(scheduler, now).request_ids == (expected,)
        scheduler.remove("small")


def test_calls_with_equal_keys_share_a_batch() -> None:
    a, b, other, alone = call("a"), call("b"), call("other", merge_key="n"), call("alone", merge_key=None)
    assert batch_of(running(FlatCost(), a, b, other, alone)).call_ids == (a.id, b.id)


def test_calls_without_a_key_never_share() -> None:
    a, b = call("a", merge_key=None), call("b", merge_key=None)
    assert batch_of(running(FlatCost(), a, b)).call_ids == (a.id,)


def test_calls_of_one_request_may_share() -> None:
    first, second = call("a"), call("a")
    scheduler = running(FlatCost(), first)
    scheduler.pending(second)
    assert batch_of(scheduler).call_ids == (first.id, second.id)


def test_batch_is_limited() -> None:
    calls = [call(name) for name in "abcde"]
    assert batch_of(running(FlatCost(), *calls, max_batch_size=3)).request_ids == ("a", "b", "c")


def test_key_may_be_learned_after_a_call_was_announced() -> None:
    a, b = call("a", merge_key=None), call("b")
    scheduler = running(FlatCost(), a, b)
    assert len(batch_of(scheduler).call_ids) == 1
    scheduler.pending(CallInfo(**{name: getattr(a, name) for name in a.__struct_fields__} | {"merge_key": "m"}))
    assert batch_of(scheduler).call_ids == (a.id, b.id)


def test_free_row_joins() -> None:
    assert len(batch_of(running(LinearCost(fixed_s=1.0, row_s=0.0), call("a"), call("b"))).call_ids) == 2


def test_row_that_saves_nothing_does_not_join() -> None:
    assert len(batch_of(running(LinearCost(fixed_s=0.0, row_s=1.0), call("a"), call("b"))).call_ids) == 1


@pytest.mark.parametrize(("row_s", "expected"), [(0.49, 2), (0.51, 1)])
def test_row_joins_if_it_delays_less_than_it_saves(row_s: float, expected: int) -> None:
    """Two wait: the second costs the first Δt, and saves itself t(1) - Δt; t(1) is 1."""
    cost = LinearCost(fixed_s=1 - row_s, row_s=row_s)
    assert len(batch_of(running(cost, call("a"), call("b"))).call_ids) == expected


def test_more_join_when_more_wait() -> None:
    cost = LinearCost(fixed_s=0.4, row_s=0.6)
    few = [call(name) for name in "abc"]
    many = [*few, *(call(name, merge_key=None, num_steps=50) for name in "defghijkl")]
    assert len(batch_of(running(cost, *few)).call_ids) < len(batch_of(running(cost, *many)).call_ids)


def test_unknown_costs_are_tried_together() -> None:
    calls = [call(name) for name in "abcd"]
    assert len(batch_of(running(CostModel(), *calls)).call_ids) == 4


def test_call_that_ran_is_not_offered_again() -> None:
    a, b = call("a"), call("b")
    scheduler = running(FlatCost(), a, b)
    scheduler.ran([a.id, b.id], 1.0)
    assert scheduler.next_batch(1.0) is None


def test_removed_request_leaves_nothing_behind() -> None:
    a, b = call("a"), call("b")
    scheduler = running(FlatCost(), a, b)
    scheduler.remove("a")
    assert batch_of(scheduler).call_ids == (b.id,)
    scheduler.pending(call("a"))
    scheduler.stepped("a", 3)
    scheduler.ran([a.id], 1.0)
    scheduler.remove("a")
    assert batch_of(scheduler).call_ids == (b.id,)


def test_requeued_request_comes_before_those_that_arrived_later() -> None:
    scheduler = Scheduler(FlatCost(), max_running_requests=2)
    for now, request_id in enumerate("abcd"):
        scheduler.add(request_id, float(now))
    scheduler.admit()
    scheduler.pending(call("b"))
    scheduler.requeue("b")
    scheduler.requeue("a")
    assert scheduler.next_batch(9.0) is None
    assert [scheduler.position(request_id) for request_id in "abcd"] == [0, 1, 2, 3]
    assert scheduler.admit() == ["a", "b"]


def test_outputs_that_arrived_together_keep_their_order_when_requeued() -> None:
    scheduler = Scheduler(FlatCost(), max_running_requests=1)
    for request_id in "abc":
        scheduler.add(request_id, 0.0)
    scheduler.admit()
    scheduler.requeue("a")
    assert scheduler.admit() == ["a"]


def test_suspects_share_no_forward_until_they_are_gone() -> None:
    scheduler = running(FlatCost(), call("a"), call("b"), call("c"))
    for request_id in "ab":
        scheduler.requeue(request_id, is_suspect=True)
    scheduler.requeue("c")
    scheduler.add("d", 9.0)
    scheduler.admit()
    calls = {request_id: call(request_id) for request_id in "abcd"}
    for info in calls.values():
        scheduler.pending(info)
    batches = []
    while (batch := scheduler.next_batch(9.0)) is not None:
        batches.append(batch.request_ids)
        scheduler.ran(batch.call_ids, 1.0)
    assert sorted(batches) == [("a",), ("b",), ("c", "d")]


def test_lone_request_runs_on_a_standing_order() -> None:
    batch = batch_of(running(LinearCost(row_s=STANDING_ORDER_S / 10), call("a")))
    assert batch.num_ticks in (9, 10)


def test_standing_order_is_at_least_one_tick() -> None:
    assert batch_of(running(LinearCost(row_s=60.0), call("a"))).num_ticks == 1


def test_no_standing_order_while_others_wait() -> None:
    cost = LinearCost(row_s=1e-3)
    assert batch_of(running(cost, call("a"), call("b", merge_key="n"))).num_ticks == 1
    queued = running(cost, call("a"), max_running_requests=1)
    queued.add("b", 0.0)
    assert batch_of(queued).num_ticks == 1
    assert batch_of(running(CostModel(), call("a"))).num_ticks == 1


def test_standing_order_for_all_that_run_together() -> None:
    cost = LinearCost(fixed_s=1e-3, row_s=0.0)
    assert batch_of(running(cost, call("a"), call("b"))).num_ticks > 1


def test_eta_is_unknown_until_something_is_known() -> None:
    scheduler = running(CostModel(), call("a"))
    scheduler.add("b", 0.0)
    assert scheduler.eta_s("a") is None
    assert scheduler.eta_s("b") is None
    assert scheduler.eta_s("unheard of") is None


def test_eta_is_the_rest_of_the_steps() -> None:
    scheduler = running(LinearCost(row_s=2.0), call("a", num_steps=10))
    assert scheduler.eta_s("a") == 20.0
    scheduler.stepped("a", 4)
    assert scheduler.eta_s("a") == 12.0


def test_eta_of_a_request_that_waits_is_that_of_earlier_ones() -> None:
    scheduler = Scheduler(LinearCost())
    scheduler.add("a", 0.0)
    scheduler.admit()
    for _ in range(3):
        info = call("a", num_steps=3)
        scheduler.pending(info)
        scheduler.ran([info.id], 2.0)
    scheduler.remove("a", is_completed=True)
    scheduler.add("b", 0.0)
    assert scheduler.eta_s("b") == 6.0
    scheduler.add("c", 0.0)
    assert scheduler.eta_s("c") == 12.0


def test_cancelled_request_teaches_nothing() -> None:
    info = call("a")
    scheduler = running(LinearCost(), info)
    scheduler.ran([info.id], 2.0)
    scheduler.remove("a")
    scheduler.add("b", 0.0)
    assert scheduler.eta_s("b") is None


@dataclass
class Simulated:
    """A request with `num_steps` calls of one key, one after the other."""

    request_id: str
    arrives_at: float
    num_steps: int
    merge_key: str | None = None
    cost_key: str = "c"
    step: int = 0
    finished_at: float | None = None

    def next_call(self) -> CallInfo:
        return call(
            self.request_id,
            num_steps=self.num_steps,
            step=self.step,
            merge_key=self.merge_key,
            cost_key=self.cost_key,
        )


@dataclass
class Device:
    """Runs what the scheduler decides on a clock of its own, and notes which request ran when."""

    scheduler: Scheduler
    cost: LinearCost
    model: CostModel | None = None
    now: float = 0.0
    ran: list[tuple[float, str]] = field(default_factory=list)

    def run(self, requests: list[Simulated]) -> None:
        """Until all are done, which takes finitely many batches."""
        coming = sorted(requests, key=lambda request: request.arrives_at)
        by_id = {request.request_id: request for request in requests}
        while any(request.finished_at is None for request in requests):
            while coming and coming[0].arrives_at <= self.now:
                self.scheduler.add(coming[0].request_id, coming.pop(0).arrives_at)
            for request_id in self.scheduler.admit():
                self.scheduler.pending(by_id[request_id].next_call())
            batch = self.scheduler.next_batch(self.now)
            if batch is None:
                assert coming, "calls are pending, and nothing runs"
                self.now = coming[0].arrives_at
                continue
            self._forward(batch, [by_id[request_id] for request_id in batch.request_ids])

    def _forward(self, batch: Batch, requests: list[Simulated]) -> None:
        assert len(set(batch.request_ids)) == len(batch.request_ids)
        keys = {request.merge_key for request in requests}
        assert len(keys) == 1
        assert len(requests) == 1 or keys != {None}
        elapsed_s = self.cost.predict(requests[0].cost_key, len(requests))
        assert elapsed_s is not None
        self.now += elapsed_s
        self.scheduler.ran(batch.call_ids, elapsed_s)
        if self.model is not None:
            self.model.observe(requests[0].cost_key, len(requests), elapsed_s)
        for request in requests:
            self.ran.append((self.now - elapsed_s, request.request_id))
            request.step += 1
            self.scheduler.stepped(request.request_id, request.step)
            if request.step < request.num_steps:
                self.scheduler.pending(request.next_call())
            else:
                request.finished_at = self.now
                self.scheduler.remove(request.request_id, is_completed=True)


@st.composite
def workloads(draw: st.DrawFn) -> list[Simulated]:
    """Requests at any time, of any length; calls that may share a forward cost the same."""
    merge_keys = draw(st.lists(st.sampled_from([None, "m", "n"]), min_size=1, max_size=12))
    return [
        Simulated(
            str(index),
            arrives_at=draw(st.floats(0, 30)),
            num_steps=draw(st.integers(1, 12)),
            merge_key=merge_key,
            cost_key=merge_key or draw(st.sampled_from("cd")),
        )
        for index, merge_key in enumerate(merge_keys)
    ]


@given(
    workloads(),
    st.builds(LinearCost, fixed_s=st.floats(0, 2), row_s=st.floats(0.01, 2)),
    st.integers(1, 8),
    st.integers(1, 8),
    st.booleans(),
)
def test_every_request_is_finished_and_no_step_is_lost_or_repeated(
    requests: list[Simulated], cost: LinearCost, max_batch_size: int, max_running: int, is_learned: bool
) -> None:
    model = CostModel() if is_learned else None
    scheduler = Scheduler(model or cost, max_batch_size=max_batch_size, max_running_requests=max_running)
    device = Device(scheduler, cost, model)
    device.run(requests)
    for request in requests:
        assert sum(request_id == request.request_id for _, request_id in device.ran) == request.num_steps
    assert scheduler.next_batch(device.now) is None


@given(
    num_steps=st.integers(2, 40),
    small_steps=st.integers(1, 3),
    load=st.floats(0.2, 1.5),
    keys=st.sampled_from([(None, None), ("m", "m")]),
)
def test_large_request_is_overtaken_only_by_those_that_came_soon_after_it(
    num_steps: int, small_steps: int, load: float, keys: tuple[str | None, str | None]
) -> None:
    """R seconds of work wait at most for the requests of the next R / AGEING seconds, however many come later."""
    large_s, small_s = float(num_steps), float(small_steps)
    bound_s = (large_s - small_s) / AGEING
    last_s = max(bound_s, 0) + 20 + 3 * large_s
    large = Simulated("large", 0.0, num_steps, keys[0])
    smalls = [
        Simulated(f"small{index}", index * small_s / load, small_steps, keys[1])
        for index in range(int(last_s * load / small_s) + 1)
    ]
    cost = LinearCost()
    # All may run: the order of admission is not what is tested.
    device = Device(Scheduler(cost, max_running_requests=10_000), cost)
    device.run([large, *smalls])
    assert large.finished_at is not None
    overtaking_s = sum(small_s for small in smalls if small.arrives_at <= max(bound_s, 0))
    assert large.finished_at <= large_s + overtaking_s + small_s + 1


class AnyOrderOfEvents(RuleBasedStateMachine):
    """The engine's events in any order it may have: what is pending is always offered, and only that."""

    @initialize(max_running=st.integers(1, 4), max_batch_size=st.integers(1, 4), cost=st.sampled_from([0.0, 0.5, None]))
    def open(self, max_running: int, max_batch_size: int, cost: float | None) -> None:
        model: Cost = CostModel() if cost is None else LinearCost(fixed_s=1 - cost, row_s=cost)
        self.max_running, self.max_batch_size = max_running, max_batch_size
        self.scheduler = Scheduler(model, max_running_requests=max_running, max_batch_size=max_batch_size)
        self.now = 0.0
        self.queued: list[str] = []
        self.arrived_at: dict[str, float] = {}
        self.running: dict[str, CallInfo | None] = {}
        self.names = count(1)

    @rule(wait_s=st.floats(0.01, 5))
    def add(self, wait_s: float) -> None:
        self.now += wait_s
        name = str(next(self.names))
        self.scheduler.add(name, self.now)
        self.queued.append(name)
        self.arrived_at[name] = self.now

    @rule()
    def admit(self) -> None:
        room = self.max_running - len(self.running)
        expected, self.queued = self.queued[:room], self.queued[room:]
        assert self.scheduler.admit() == expected
        self.running |= dict.fromkeys(expected)

    @precondition(lambda self: None in self.running.values())
    @rule(data=st.data(), merge_key=st.sampled_from([None, "m", "n"]), kind=st.sampled_from(["encode", "denoise"]))
    def announce(self, data: st.DataObject, merge_key: str | None, kind: CallKind) -> None:
        name = data.draw(st.sampled_from([name for name, info in self.running.items() if info is None]))
        info = self.running[name] = call(name, merge_key=merge_key, kind=kind)
        self.scheduler.pending(info)

    @precondition(lambda self: any(self.running.values()))
    @rule(elapsed_s=st.floats(0.01, 5), num_lost=st.integers(0, 1))
    def run_batch(self, elapsed_s: float, num_lost: int) -> None:
        batch = batch_of(self.scheduler, self.now)
        self.now += elapsed_s
        done = batch.call_ids[num_lost:]
        self.scheduler.ran(done, elapsed_s)
        for name, info in self.running.items():
            if info is not None and info.id in done:
                self.running[name] = None

    @precondition(lambda self: self.queued or self.running)
    @rule(data=st.data(), is_completed=st.booleans())
    def remove(self, data: st.DataObject, is_completed: bool) -> None:
        name = data.draw(st.sampled_from([*self.queued, *self.running]))
        self.scheduler.remove(name, is_completed=is_completed)
        if name in self.running:
            del self.running[name]
        else:
            self.queued.remove(name)

    @precondition(lambda self: self.running)
    @rule()
    def lose_rank(self) -> None:
        for name in self.running:
            self.scheduler.requeue(name)
        self.queued = sorted([*self.queued, *self.running], key=lambda name: self.arrived_at[name])
        self.running = {}

    @invariant()
    def queue_is_in_order_of_arrival(self) -> None:
        assert [self.scheduler.position(name) for name in self.queued] == list(range(len(self.queued)))

    @invariant()
    def next_batch_is_of_what_is_pending(self) -> None:
        pending = {info.id: info for info in self.running.values() if info is not None}
        batch = self.scheduler.next_batch(self.now)
        assert (batch is None) == (not pending)
        if batch is None:
            return
        calls = [pending[call_id] for call_id in batch.call_ids]
        assert batch.request_ids == tuple(info.request_id for info in calls)
        assert len(set(batch.call_ids)) == len(batch.call_ids) <= self.max_batch_size
        keys = {info.merge_key for info in calls}
        assert len(keys) == 1
        assert len(calls) == 1 or None not in keys
        assert batch.num_ticks >= 1
        if self.queued or len(calls) < len(self.running):
            assert batch.num_ticks == 1

    @invariant()
    def etas_are_sensible(self) -> None:
        for name in [*self.queued, *self.running]:
            eta_s = self.scheduler.eta_s(name)
            assert eta_s is None or eta_s >= 0


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
