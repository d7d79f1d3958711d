import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from pipelines import build

from sgld.errors import Cancelled
from sgld.outcome import Outcome, Raised, Value
from sgld.worker.binding import bind
from sgld.worker.calls import Call
from sgld.worker.executor import Executor, single
from sgld.worker.job import Job
from sgld.worker.session import Session
from sgld.worker.task import Task
from worker.requests import Doubling, call_of, calls_until_end, picture, request, run_to_end, running

NAMES = ("flux", "wan")


def two_calls(task: Task) -> torch.Tensor:
    """Doubles twice."""
    module, x = Doubling(), torch.ones(1, 2)
    for _ in range(2):
        x = task.hand_over(call_of(module, x))
    return x


def test_task_stops_at_each_call_and_goes_on_with_its_outcome() -> None:
    task = Task("request", two_calls)
    assert (task.call, task.end) == (None, None)

    task.advance()
    assert task.call is not None
    task.advance(single(task.call))
    assert task.call is not None
    task.advance(Value(torch.full((1, 2), 7.0)))

    assert task.call is None
    assert isinstance(task.end, Value)
    assert task.end.value.tolist() == [[7.0, 7.0]]
    assert task.num_calls == 2


def test_body_does_not_begin_before_the_task_is_advanced() -> None:
    begun = threading.Event()
    task = Task("request", lambda _task: begun.set())
    assert not begun.is_set()
    task.advance()
    assert begun.is_set()
    assert task.end == Value(None)


def test_thread_is_over_when_the_task_has_ended() -> None:
    task = Task("thread-test", two_calls)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "task-thread-test")
    run_to_end(task)
    assert not thread.is_alive()


class Baton:
    """Counts who runs: `holding` around everything that Python does in a task or in the executor."""

    def __init__(self) -> None:
        self.num_running = 0
        self.most = 0

    def take(self) -> None:
        self.num_running += 1
        self.most = max(self.most, self.num_running)

    def give(self) -> None:
        self.num_running -= 1


def test_never_two_run_at_once() -> None:
    baton = Baton()

    def body(task: Task) -> Any:
        baton.take()
        try:
            x = torch.ones(1, 2)
            for _ in range(20):
                call = call_of(Doubling(), x)
                baton.give()
                x = task.hand_over(call)
                baton.take()
            return x
        finally:
            baton.give()

    tasks = [Task(str(index), body) for index in range(4)]
    for task in tasks:
        task.advance()
    while pending := [task for task in tasks if task.call is not None]:
        for task in pending:
            assert task.call is not None
            baton.take()
            outcome = single(task.call)
            baton.give()
            task.advance(outcome)

    assert (baton.most, baton.num_running) == (1, 0)
    assert all(isinstance(task.end, Value) for task in tasks)


def test_error_of_a_call_is_raised_inside_the_task() -> None:
    def body(task: Task) -> str:
        try:
            task.hand_over(call_of(Doubling(), torch.ones(1)))
        except KeyError as error:
            return f"seen: {error}"
        return "not seen"

    task = running(body)
    task.advance(Raised(KeyError("x")))
    assert task.end == Value("seen: 'x'")


def test_what_is_kept_of_a_result_may_fail_for_its_task_only() -> None:
    call = call_of(Doubling(), torch.ones(1))

    def full(_value: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    call.answered = full
    task = running(lambda task: task.hand_over(call))
    task.advance(Value(torch.ones(1)))
    assert isinstance(task.end, Raised)
    assert isinstance(task.end.error, torch.OutOfMemoryError)


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(3)])
def test_whatever_the_body_raises_is_the_end_of_the_task(error: BaseException) -> None:
    def body(_task: Task) -> None:
        raise error

    assert running(body).end == Raised(error)


def test_cancelled_before_its_first_advance() -> None:
    begun = threading.Event()
    task = Task("request", lambda _task: begun.set())
    task.cancel()
    assert isinstance(task.end, Raised)
    assert isinstance(task.end.error, Cancelled)
    assert not begun.is_set()


def test_cancelling_an_ended_task_changes_nothing() -> None:
    task = running(lambda _task: 1)
    task.cancel()
    assert task.end == Value(1)


def test_cancellation_passes_an_except_exception() -> None:
    def body(task: Task) -> str:
        try:
            task.hand_over(call_of(Doubling(), torch.ones(1)))
        except Exception:  # noqa: BLE001 - as pipelines do
            return "swallowed"
        return "done"

    task = running(body)
    task.cancel()
    assert isinstance(task.end, Raised)
    assert isinstance(task.end.error, Cancelled)


def test_pipeline_that_swallows_the_cancellation_gets_no_further_call() -> None:
    made: list[int] = []

    def body(task: Task) -> str:
        for index in range(5):
            try:
                task.hand_over(call_of(Doubling(), torch.ones(1)))
                made.append(index)
            except BaseException:  # noqa: BLE001 - what is tested
                continue
        return "done"

    task = running(body)
    task.cancel()
    assert task.end == Value("done")
    assert made == []
    assert task.num_calls == 1


def test_cleanup_of_the_pipeline_runs_when_it_is_cancelled() -> None:
    cleaned = threading.Event()

    def body(task: Task) -> None:
        try:
            two_calls(task)
        finally:
            cleaned.set()

    task = running(body)
    task.cancel()
    assert cleaned.is_set()


def test_steps_are_told_and_put_into_the_calls_that_follow() -> None:
    told: list[tuple[int, int]] = []

    def body(task: Task) -> None:
        for step in range(1, 4):
            task.hand_over(call_of(Doubling(), torch.ones(1)))
            task.stepped(step, 3)

    task = running(body, num_steps=9, on_step=lambda task: told.append((task.step, task.num_steps)))
    seen = [(call.step_index, call.num_steps) for call in calls_until_end(task)]
    assert seen == [(0, 9), (1, 3), (2, 3)]
    assert told == [(1, 3), (2, 3), (3, 3)]


def bound_run(pipeline: Any, kwargs: dict[str, Any], kept: list[Any]) -> Any:
    """A body that runs the pipeline, and leaves weak references to its copy and to what its calls are given."""

    def body(task: Task) -> Any:
        bound = bind(pipeline, task)
        kept.append(weakref.ref(bound))
        return bound(**kwargs)

    return body


def number_of_calls(name: str) -> int:
    pipeline, kwargs = build(name)
    task = running(bound_run(pipeline, request(name, 0, kwargs), []))
    return sum(1 for _ in calls_until_end(task))


@pytest.mark.parametrize("name", NAMES)
def test_cancelled_at_any_call_nothing_of_a_request_is_left(name: str) -> None:
    pipeline, kwargs = build(name)
    kinds = []
    for stop in range(number_of_calls(name)):
        kept: list[Any] = []
        task = running(bound_run(pipeline, request(name, 0, kwargs), kept))
        thread = task._thread
        for index, call in enumerate(calls_until_end(task)):
            if index == stop:
                kinds.append(call.kind)
                kept += [weakref.ref(leaf) for leaf in call.kwargs.values() if isinstance(leaf, torch.Tensor)]
                break
        task.cancel()

        assert isinstance(task.end, Raised)
        assert isinstance(task.end.error, Cancelled)
        assert not thread.is_alive()
        del task, thread, call
        gc.collect()
        assert [reference() for reference in kept if reference() is not None] == []
    assert set(kinds) == {"encode", "denoise", "decode"}


@pytest.mark.parametrize("merge", [False, True])
def test_others_finish_right_when_one_is_cancelled_at_any_call(merge: bool) -> None:
    pipeline, kwargs = build("flux")
    plain = [picture(pipeline(**request("flux", index, kwargs))) for index in (0, 1)]
    for stop in range(0, number_of_calls("flux"), 2):
        outcomes: dict[str, Outcome] = {}
        session = Session(
            Executor(merge=merge),
            lambda _reply: None,
            lambda task, outcome, outcomes=outcomes: outcomes.update({task.request_id: outcome}),  # type: ignore[misc]
        )
        for index in (0, 1, 2):
            session.start(Job(str(index), pipeline, request("flux", index, kwargs)))
        for tick in range(100):
            if tick == stop:
                session.cancel("2")
            waiting = pending(session)
            if not waiting:
                break
            for calls in waiting:
                session.run(calls)

        ended = outcomes["2"]
        assert isinstance(ended, Raised)
        assert isinstance(ended.error, Cancelled)
        for index in (0, 1):
            outcome = outcomes[str(index)]
            assert isinstance(outcome, Value)
            torch.testing.assert_close(picture(outcome.value), plain[index], rtol=0, atol=1e-4 if merge else 0)


def pending(session: Session) -> list[list[int]]:
    """The ids of the calls that wait, those together that may share a forward."""
    groups: dict[str, list[int]] = {}
    for task in session._tasks.values():
        call = task.call
        assert isinstance(call, Call)
        groups.setdefault(session.executor.merge_key(call) or str(call.id), []).append(call.id)
    return list(groups.values())


def test_a_finished_task_keeps_nothing_but_its_result() -> None:
    pipeline, kwargs = build("flux")
    kept: list[Any] = []
    task = running(bound_run(pipeline, request("flux", 0, kwargs), kept))
    assert picture(run_to_end(task)).shape == (1, 3, 16, 16)
    gc.collect()
    assert kept[0]() is None
