"""The tasks of one rank, and what the scheduler's decisions do to them. Synchronous: whoever calls owns the device."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgld.errors import Cancelled
from sgld.messages import CallInfo, Pending, Ran, Stepped
from sgld.worker.binding import bind
from sgld.worker.calls import Call
from sgld.worker.executor import Executor, Tick
from sgld.worker.probe import probed_axes
from sgld.worker.task import Outcome, Raised, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a task runs: a pipeline with arguments.

    `prepare` is given the task and its bound pipeline before, `finish` what the pipeline returned.
    """

    request_id: str
    pipeline: Any
    kwargs: dict[str, Any]
    num_steps: int = 0
    prepare: Callable[[Task, Any], None] = lambda task, bound: None
    finish: Callable[[Any], Any] = lambda result: result


@dataclass
class Counters:
    """What was merged so far."""

    merged_calls: int = 0
    largest_batch: int = 0


@dataclass
class Session:
    """Starts, runs and cancels tasks.

    :param emit: told each call that waits, each execution and each step.
    :param ended: told how a task ended; a task's own exception never reaches another.
    """

    executor: Executor
    emit: Callable[[Pending | Ran | Stepped], None]
    ended: Callable[[Task, Outcome], None]
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        self._tasks: dict[str, Task] = {}
        self._jobs: dict[str, Job] = {}
        self._probed: set[str] = set()
        self._exclusive: Task | None = None
        # What waits for its end: outcomes that weren't given to their tasks, and jobs that weren't begun.
        self._held: dict[str, Outcome] = {}
        self._deferred: dict[str, Job] = {}

    def start(self, job: Job) -> None:
        """Run a new task to its first call; while an exclusive one goes on, it waits for its end."""
        if self._exclusive is not None:
            self._deferred[job.request_id] = job
            return
        task = self._task_of(job)
        self._tasks[job.request_id], self._jobs[job.request_id] = task, job
        was_alone = len(self._tasks) == 2
        self._advance(task, None)
        if was_alone:
            self._announce_again(except_for=task)

    def _task_of(self, job: Job) -> Task:
        def body(task: Task) -> Any:
            bound = bind(job.pipeline, task)
            job.prepare(task, bound)
            return job.finish(bound(**job.kwargs))

        return Task(job.request_id, body, num_steps=job.num_steps, on_step=self._stepped)

    def run(
        self, call_ids: Sequence[int], num_ticks: int = 1, is_interrupted: Callable[[], bool] = lambda: False
    ) -> None:
        """Run calls as one forward and their tasks to the next ones; then those, `num_ticks` times in all.

        It ends early when the next calls don't share a forward, and when `is_interrupted`.
        """
        for tick in range(num_ticks):
            if tick and is_interrupted():
                return
            wanted = set(call_ids)
            tasks = [t for t in self._tasks.values() if t.call is not None and t.call.id in wanted]
            # While a component isn't what the others expect, its task is the one that goes on.
            call_ids = self._tick([self._exclusive] if self._exclusive is not None else tasks)
            if not call_ids:
                return

    def cancel(self, request_id: str) -> None:
        """End a task at the call where it waits; one that has ended is left alone."""
        if (job := self._deferred.pop(request_id, None)) is not None:
            self._tasks[request_id], self._jobs[request_id] = self._task_of(job), job
        self._held.pop(request_id, None)
        task = self._tasks.get(request_id)
        if task is not None:
            task.cancel()
            self._finish(task)

    def close(self) -> None:
        """Cancel all tasks."""
        for request_id in [*self._deferred, *self._tasks]:
            self.cancel(request_id)

    def _tick(self, tasks: list[Task]) -> Sequence[int]:
        """One forward; returns the calls that follow if they can share the next one."""
        calls = [task.call for task in tasks if task.call is not None]
        if not calls:
            return ()
        tick = self.executor.run(calls)
        if tick.is_merged:
            self.counters.merged_calls += len(calls)
        self.counters.largest_batch = max(self.counters.largest_batch, len(calls) if tick.is_merged else 1)
        self._emit_ran(calls, tick)
        for task, outcome in zip(tasks, tick.outcomes, strict=True):
            self._advance(task, outcome)
        return self._following(tasks, calls[0])

    def _emit_ran(self, calls: Sequence[Call], tick: Tick) -> None:
        self.emit(
            Ran(
                call_ids=tuple(call.id for call in calls),
                cost_key=calls[0].cost_key,
                rows=sum(call.rows for call in calls),
                elapsed_s=tick.elapsed_s,
                is_timed=tick.is_timed,
            )
        )

    def _following(self, tasks: list[Task], ran: Call) -> Sequence[int]:
        """The tasks' next calls, if they are like the one that ran and may share a forward."""
        following = [task.call for task in tasks if task.call is not None]
        if len(following) < len(tasks) or len({call.cost_key for call in following} | {ran.cost_key}) > 1:
            return ()
        keys = {self.executor.merge_key(call) for call in following} if len(following) > 1 else {""}
        return [call.id for call in following] if len(keys) == 1 and None not in keys else ()

    def _advance(self, task: Task, outcome: Outcome | None) -> None:
        if self._exclusive not in (None, task):
            assert outcome is not None
            self._held[task.request_id] = outcome
            return
        task.advance(outcome)
        if task.end is not None:
            self._finish(task)
        elif task.call is not None:
            self._note_exclusive(task, task.call)
            self._announce(task.request_id, task.call)

    def _note_exclusive(self, task: Task, call: Call) -> None:
        if task.exclusive_because is None:
            return
        if self._exclusive is None:
            logger.info("request %s runs exclusively: it uses %s", task.request_id, task.exclusive_because)
        self._exclusive = task
        self.executor.verdicts.modes[call.component] = "exclusive"

    def _finish(self, task: Task) -> None:
        del self._tasks[task.request_id], self._jobs[task.request_id]
        for snapshot in task.snapshots:
            snapshot.restore()
        assert task.end is not None
        self.ended(task, task.end)
        if task is self._exclusive:
            self._exclusive = None
            self._let_others_go_on()

    def _let_others_go_on(self) -> None:
        """What waited for an exclusive task; one of these may be exclusive in turn, then the rest wait again."""
        held, self._held = self._held, {}
        deferred, self._deferred = self._deferred, {}
        for request_id, outcome in held.items():
            self._advance(self._tasks[request_id], outcome)
        for job in deferred.values():
            self.start(job)

    def _announce(self, request_id: str, call: Call) -> None:
        """Tell the scheduler of a call. Keys matter only in company, and only then is anything learned for them."""
        merge_key = None
        if len(self._tasks) > 1 and self._exclusive is None:
            self._learn(self._jobs[request_id], call)
            merge_key = self.executor.merge_key(call)
        self.emit(
            Pending(
                call=CallInfo(
                    id=call.id,
                    request_id=request_id,
                    kind=call.kind,
                    component=call.component,
                    merge_key=merge_key,
                    cost_key=call.cost_key,
                    rows=call.rows,
                    step_index=call.step_index,
                    num_steps=call.num_steps,
                )
            )
        )

    def _announce_again(self, except_for: Task) -> None:
        for task in list(self._tasks.values()):
            if task is not except_for and task.call is not None:
                self._announce(task.request_id, task.call)

    def _learn(self, job: Job, call: Call) -> None:
        """Probe each pipeline class once, when a call comes whose axes aren't known."""
        name = type(job.pipeline).__name__
        if self.executor.merges and name not in self._probed and not self.executor.knows(call):
            self._probed.add(name)
            self.executor.verdicts.axes |= probed_axes(job.pipeline, job.kwargs, self.executor.pulse)

    def _stepped(self, task: Task) -> None:
        self.emit(Stepped(request_id=task.request_id, step=task.step, num_steps=task.num_steps))


def is_cancelled(outcome: Outcome) -> bool:
    """Whether a task ended because it was told to."""
    return isinstance(outcome, Raised) and isinstance(outcome.error, Cancelled)
