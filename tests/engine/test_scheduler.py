import msgspec
import pytest

from engine.calls import LinearCost, batch_of, call, running
from sgld.engine.cost import CostModel, FlatCost
from sgld.engine.demand import Demand, Profiles
from sgld.engine.scheduler import ETA_ORDER_S, STANDING_ORDER_S, Scheduler
from sgld.errors import DeadlineImpossible, QueueFull


def completed(scheduler: Scheduler, request_id: str, num_steps: int, demand: Demand, step_s: float = 2.0) -> None:
    """Let a request run alone from start to end."""
    scheduler.add(request_id, 0.0, demand)
    scheduler.admit(0.0)
    for step in range(num_steps):
        info = call(request_id, num_steps=num_steps)
        scheduler.pending(info)
        scheduler.ran([info.id], step_s)
        scheduler.stepped(request_id, step + 1)
    scheduler.remove(request_id, is_completed=True)


def test_nothing_runs_while_nothing_is_pending() -> None:
    scheduler = Scheduler(FlatCost())
    assert scheduler.next_batch(0.0) is None
    scheduler.add("a", 0.0)
    assert scheduler.next_batch(0.0) is None
    assert scheduler.admit(0.0) == ["a"]
    assert scheduler.next_batch(0.0) is None


def test_a_lone_call_runs() -> None:
    only = call("a")
    batch = batch_of(running(LinearCost(fixed_s=0.5, row_s=0.25), only))
    assert (batch.call_ids, batch.request_ids, batch.predicted_s) == ((only.id,), ("a",), 0.75)


def test_requests_are_admitted_in_order_up_to_the_limit() -> None:
    scheduler = Scheduler(FlatCost(), max_running_requests=2)
    for request_id in "abc":
        scheduler.add(request_id, 0.0)
    assert scheduler.admit(0.0) == ["a", "b"]
    assert scheduler.admit(0.0) == []
    scheduler.remove("a", is_completed=True)
    assert scheduler.admit(0.0) == ["c"]


def test_short_and_urgent_requests_are_admitted_first() -> None:
    scheduler = Scheduler(LinearCost(row_s=2.0), max_running_requests=1)
    short, long = Demand(like="short"), Demand(like="long")
    completed(scheduler, "1", 5, short)
    completed(scheduler, "2", 50, long)
    scheduler.add("long", 0.0, long)
    scheduler.add("short", 1.0, short)
    scheduler.add("urgent", 2.0, Demand(like="long", priority=1))
    assert [scheduler.position(name, 2.0) for name in ("urgent", "short", "long")] == [0, 1, 2]
    for name in ("urgent", "short", "long"):
        assert scheduler.admit(2.0) == [name]
        scheduler.remove(name)


def test_full_queue_refuses_and_says_the_limit() -> None:
    scheduler = Scheduler(FlatCost(), max_running_requests=1, max_queued_requests=2)
    scheduler.check_room(Demand(), 3, 0.0)  # one of them runs at once
    for request_id in ("a", "b"):
        scheduler.add(request_id, 0.0)
    scheduler.admit(0.0)
    scheduler.check_room(Demand(), 1, 0.0)
    with pytest.raises(QueueFull, match=r"1 requests wait and 2 more would exceed the limit of 2") as refused:
        scheduler.check_room(Demand(), 2, 0.0)
    assert refused.value.retry_after_s is None
    scheduler.remove("b")
    scheduler.check_room(Demand(), 2, 0.0)


def test_full_queue_says_when_there_is_room() -> None:
    scheduler = Scheduler(LinearCost(row_s=2.0), max_running_requests=1, max_queued_requests=1)
    completed(scheduler, "1", 3, Demand())
    for request_id in ("a", "b"):
        scheduler.add(request_id, 0.0)
    scheduler.admit(0.0)
    for num_requests, expected_s in ((1, 6.0), (2, 12.0)):
        with pytest.raises(QueueFull) as refused:
            scheduler.check_room(Demand(), num_requests, 0.0)
        assert refused.value.retry_after_s == pytest.approx(expected_s)


def test_more_requests_than_ever_fit_are_refused_without_a_promise() -> None:
    scheduler = Scheduler(FlatCost(), max_running_requests=1, max_queued_requests=1)
    with pytest.raises(QueueFull) as refused:
        scheduler.check_room(Demand(), 5, 0.0)
    assert refused.value.retry_after_s is None


def test_deadline_that_cannot_be_met_is_refused_with_prediction_and_limit() -> None:
    scheduler = Scheduler(LinearCost(row_s=2.0))
    scheduler.check_room(Demand(like="a", deadline_s=5.0), 1, 0.0)  # nothing is known
    completed(scheduler, "1", 4, Demand(like="a"))
    with pytest.raises(DeadlineImpossible, match=r"deadline_s is 5, but such a request takes 8 s") as refused:
        scheduler.check_room(Demand(like="a", deadline_s=5.0), 1, 0.0)
    assert refused.value.param == "deadline_s"
    scheduler.check_room(Demand(like="a", deadline_s=8.5), 1, 0.0)


def test_guess_refuses_no_deadline() -> None:
    scheduler = Scheduler(LinearCost(row_s=2.0))
    completed(scheduler, "1", 4, Demand(like="a", work=1.0))
    scheduler.check_room(Demand(like="b", work=100.0, deadline_s=5.0), 1, 0.0)


def test_position_counts_those_that_wait_before() -> None:
    scheduler = Scheduler(FlatCost(), max_running_requests=1)
    for request_id in "abcd":
        scheduler.add(request_id, 0.0)
    scheduler.admit(0.0)
    assert [scheduler.position(request_id, 0.0) for request_id in "bcd"] == [0, 1, 2]
    scheduler.remove("c")
    assert [scheduler.position(request_id, 0.0) for request_id in "bd"] == [0, 1]


def test_least_remaining_time_runs_first() -> None:
    long, short = call("long", num_steps=50, merge_key=None), call("short", num_steps=5, merge_key=None)
    assert batch_of(running(LinearCost(), long, short)).call_ids == (short.id,)


def test_request_near_its_end_goes_before_a_shorter_one() -> None:
    long, short = call("long", num_steps=50, merge_key=None), call("short", num_steps=5, merge_key=None)
    scheduler = running(LinearCost(), long, short)
    for step in range(48):
        scheduler.ran([long.id], 1.0)
        scheduler.stepped("long", step + 1)
        long = call("long", num_steps=50, merge_key=None)
        scheduler.pending(long)
    assert batch_of(scheduler).call_ids == (long.id,)


def test_request_whose_step_the_device_has_goes_on() -> None:
    """Two that have as much left would take turns, and both be done late, if it counted as left."""
    scheduler = running(LinearCost(), call("a", merge_key=None), call("b", merge_key=None))
    for step in range(1, 4):
        batch = batch_of(scheduler)
        assert batch.request_ids == ("a",)
        scheduler.launched(batch.call_ids)
        scheduler.pending(call("a", merge_key=None, step=step))


def test_priority_goes_before_a_shorter_request() -> None:
    scheduler = Scheduler(LinearCost())
    scheduler.add("short", 0.0)
    scheduler.add("urgent", 0.0, Demand(priority=5))
    scheduler.admit(0.0)
    scheduler.pending(call("short", num_steps=1))
    scheduler.pending(call("urgent", num_steps=50))
    # Nor does the short one share its forward: that would delay it.
    assert batch_of(scheduler).request_ids == ("urgent",)


def test_unknown_calls_are_tried_first() -> None:
    known, unknown = call("known", num_steps=1, merge_key=None), call("unknown", cost_key="new", merge_key=None)
    assert batch_of(running(LinearCost(by_key={"new": None}), known, unknown)).call_ids == (unknown.id,)


def test_what_others_teach_changes_the_order() -> None:
    """Three unknown requests wait; once one ran, the others are known to be long."""
    cost = CostModel()
    cost.observe("known", 1, 1.0)
    scheduler = running(
        cost,
        *(call(name, num_steps=50, cost_key="new", merge_key=None) for name in "abc"),
        call("d", num_steps=9, cost_key="known", merge_key=None),
    )
    first = batch_of(scheduler)
    assert first.request_ids == ("a",)
    scheduler.ran(first.call_ids, 2.0)
    cost.observe("new", 1, 2.0)
    assert batch_of(scheduler).request_ids == ("d",)


def test_newcomer_encodes_before_a_batch_that_it_can_join() -> None:
    scheduler = Scheduler(LinearCost(fixed_s=1.0, row_s=0.0))
    completed(scheduler, "1", 9, Demand())
    for request_id in "ab":
        scheduler.add(request_id, 0.0)
    scheduler.admit(0.0)
    scheduler.pending(call("a", num_steps=9))
    encode = call("b", kind="encode", cost_key="encode", merge_key=None, num_steps=0)
    scheduler.pending(encode)
    assert batch_of(scheduler).call_ids == (encode.id,)
    scheduler.ran([encode.id], 1.0)
    scheduler.pending(call("b", num_steps=9))
    assert batch_of(scheduler).request_ids == ("a", "b")


def test_calls_with_equal_keys_share_a_batch() -> None:
    a, b, other, alone = call("a"), call("b"), call("other", merge_key="n"), call("alone", merge_key=None)
    assert batch_of(running(FlatCost(), a, b, other, alone)).call_ids == (a.id, b.id)


def test_calls_of_one_request_may_share() -> None:
    first, second = call("a"), call("a")
    batch = batch_of(running(FlatCost(), first, second))
    assert (batch.call_ids, batch.request_ids) == ((first.id, second.id), ("a",))


def test_batch_is_limited() -> None:
    calls = [call(name) for name in "abcde"]
    assert batch_of(running(FlatCost(), *calls, max_batch_size=3)).request_ids == ("a", "b", "c")


def test_key_may_be_learned_after_a_call_was_announced() -> None:
    a, b = call("a", merge_key=None), call("b")
    scheduler = running(FlatCost(), a, b)
    assert len(batch_of(scheduler).call_ids) == 1
    scheduler.pending(msgspec.structs.replace(a, merge_key="m"))
    assert batch_of(scheduler).call_ids == (a.id, b.id)


def test_queued_requests_count_among_those_that_gain() -> None:
    cost = LinearCost(fixed_s=0.45, row_s=0.55)
    scheduler = running(cost, call("a"), call("b"), max_running_requests=2)
    assert len(batch_of(scheduler).call_ids) == 1
    for request_id in "cdef":
        scheduler.add(request_id, 0.0)
    assert len(batch_of(scheduler).call_ids) == 2


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
    scheduler.admit(4.0)
    scheduler.pending(call("b"))
    scheduler.requeue("b")
    scheduler.requeue("a")
    assert scheduler.next_batch(9.0) is None
    assert [scheduler.position(request_id, 9.0) for request_id in "abcd"] == [0, 1, 2, 3]
    assert scheduler.admit(9.0) == ["a", "b"]


def test_outputs_that_arrived_together_keep_their_order_when_requeued() -> None:
    scheduler = Scheduler(FlatCost(), max_running_requests=1)
    for request_id in "abc":
        scheduler.add(request_id, 0.0)
    scheduler.admit(0.0)
    scheduler.requeue("a")
    assert scheduler.admit(0.0) == ["a"]


def test_suspects_share_no_forward_until_they_are_gone() -> None:
    scheduler = running(FlatCost(), call("a"), call("b"), call("c"))
    for request_id in "ab":
        scheduler.requeue(request_id, is_suspect=True)
    scheduler.requeue("c")
    scheduler.add("d", 9.0)
    scheduler.admit(9.0)
    for request_id in "abcd":
        scheduler.pending(call(request_id))
    batches = []
    while (batch := scheduler.next_batch(9.0)) is not None:
        batches.append(batch.request_ids)
        scheduler.ran(batch.call_ids, 1.0)
    assert sorted(batches) == [("a",), ("b",), ("c", "d")]


def test_lone_call_runs_to_its_last_step_on_one_order() -> None:
    """However long steps take: whoever comes ends it."""
    slow = LinearCost(row_s=60.0)
    assert batch_of(running(slow, call("a", num_steps=10, step=3))).num_ticks == 7
    assert batch_of(running(slow, call("a", num_steps=10, step=10, kind="decode"))).num_ticks == 1


def test_those_that_run_together_are_decided_on_again_after_a_while() -> None:
    """With time deadlines press, and what is learned may part them."""
    cost = LinearCost(fixed_s=STANDING_ORDER_S / 10, row_s=0.0)
    assert batch_of(running(cost, call("a"), call("b"))).num_ticks in (9, 10)
    slow = LinearCost(fixed_s=60.0, row_s=0.0)
    assert batch_of(running(slow, call("a"), call("b"))).num_ticks == 1
    assert batch_of(running(slow, call("a"), call("a"))).num_ticks == 1


def test_how_many_ranks_share_a_forward_is_decided_on_again_after_a_while() -> None:
    scheduler = Scheduler(LinearCost(row_s=60.0), num_ranks=2)
    scheduler.add("a", 0.0)
    scheduler.admit(0.0)
    scheduler.pending(call("a", max_degree=2))
    assert batch_of(scheduler).num_ticks == 1


def test_no_standing_order_while_others_wait() -> None:
    cost = LinearCost(row_s=1e-3)
    assert batch_of(running(cost, call("a"), call("b", merge_key="n"))).num_ticks == 1
    queued = running(cost, call("a"), max_running_requests=1)
    queued.add("b", 0.0)
    assert batch_of(queued).num_ticks == 1
    assert batch_of(running(CostModel(), call("a"))).num_ticks == 1
    assert batch_of(running(cost, call("a"), call("a", merge_key="n"))).num_ticks == 1


def test_standing_order_for_all_that_run_together() -> None:
    cost = LinearCost(fixed_s=1e-3, row_s=0.0)
    assert batch_of(running(cost, call("a"), call("b"))).num_ticks > 1
    assert batch_of(running(cost, call("a"), call("a"))).num_ticks > 1


def test_nobody_else_runs_while_one_is_exclusive() -> None:
    """The rank runs only its calls then: whoever else was told to run would be blamed for what it does."""
    other, exclusive = call("short", num_steps=1), call("long", num_steps=99, is_exclusive=True)
    scheduler = running(LinearCost(), other, exclusive)
    assert batch_of(scheduler).call_ids == (exclusive.id,)
    scheduler.ran([exclusive.id], 1.0)
    assert batch_of(scheduler).call_ids == (other.id,)


def test_nobody_runs_beside_one_that_is_exclusive() -> None:
    other, exclusive = call("a", is_bound=False), call("b", is_exclusive=True)
    scheduler = Scheduler(LinearCost(), num_ranks=2)
    for info in (other, exclusive):
        scheduler.add(info.request_id, 0.0)
    scheduler.admit(0.0)
    for info in (other, exclusive):
        scheduler.pending(info)
    alone = batch_of(scheduler)
    assert alone.call_ids == (exclusive.id,)
    assert scheduler.next_batch(0.0, [alone]) is None


def test_order_for_etas_is_kept_for_a_moment_only() -> None:
    scheduler = running(LinearCost(), call("a", num_steps=5), call("b", num_steps=8, merge_key="n"))
    assert scheduler.eta_s("a", 0.0) == 5.0
    scheduler.stepped("b", 7)
    assert scheduler.eta_s("b", ETA_ORDER_S / 2) == pytest.approx(5.0 + 1 / 8)
    assert scheduler.eta_s("b", ETA_ORDER_S) == pytest.approx(1 / 8)
    scheduler.remove("a")
    assert scheduler.eta_s("a", ETA_ORDER_S) is None


def test_eta_is_unknown_until_something_is_known() -> None:
    scheduler = running(CostModel(), call("a"))
    scheduler.add("b", 0.0)
    assert scheduler.eta_s("a", 0.0) is None
    assert scheduler.eta_s("b", 0.0) is None
    assert scheduler.eta_s("unheard of", 0.0) is None


def test_eta_is_the_rest_of_the_steps() -> None:
    info = call("a", num_steps=10)
    scheduler = running(LinearCost(row_s=2.0), info)
    assert scheduler.eta_s("a", 0.0) == 20.0
    scheduler.ran([info.id], 2.0)
    scheduler.stepped("a", 1)
    assert scheduler.eta_s("a", 2.0) == 18.0


def test_eta_of_a_request_that_waits_is_that_of_earlier_ones_like_it() -> None:
    scheduler = Scheduler(LinearCost(row_s=2.0))
    completed(scheduler, "a", 3, Demand())
    scheduler.add("b", 0.0)
    assert scheduler.eta_s("b", 0.0) == 6.0
    scheduler.add("c", 0.0)
    assert scheduler.eta_s("c", 0.0) == 12.0
    scheduler.add("d", 0.0, Demand(priority=1))
    assert [scheduler.eta_s(name, 0.0) for name in "bcd"] == [12.0, 18.0, 6.0]


def test_eta_considers_who_shares_forwards() -> None:
    """Both run their five steps together; then the larger one is alone."""
    scheduler = running(LinearCost(fixed_s=1.0, row_s=0.5), call("a", num_steps=5), call("b", num_steps=8))
    assert scheduler.eta_s("a", 0.0) == pytest.approx(5 * 2.0)
    assert scheduler.eta_s("b", 0.0) == pytest.approx(5 * 2.0 + 3 * 1.5)


def test_cancelled_request_teaches_nothing() -> None:
    info = call("a")
    scheduler = running(LinearCost(), info)
    scheduler.ran([info.id], 2.0)
    scheduler.remove("a")
    scheduler.add("b", 0.0)
    assert scheduler.eta_s("b", 0.0) is None


def test_what_was_learned_of_requests_is_recalled() -> None:
    cost = LinearCost(row_s=2.0)
    learned, recalled = Profiles(cost), Profiles(cost)
    completed(Scheduler(cost, learned), "a", 3, Demand())
    recalled.recall(learned.learned())
    new = Scheduler(cost, recalled)
    new.add("b", 0.0)
    assert new.eta_s("b", 0.0) == 6.0
