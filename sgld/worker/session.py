"""The tasks of one rank, and what the scheduler's decisions do to them. Synchronous: whoever calls owns the device."""

import functools
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import nn

from sgld.messages import CallInfo
from sgld.outcome import Outcome, Raised, Value
from sgld.parallel import FIRST, Ranks
from sgld.worker.ahead import News
from sgld.worker.calls import Call, Stretch
from sgld.worker.executor import Executor, Tick
from sgld.worker.job import Job, task_of
from sgld.worker.probe import probed_axes
from sgld.worker.slots import everywhere
from sgld.worker.snapshot import next_hook_id, remove_hooks
from sgld.worker.task import Task, is_cancelled
from sgld.worker.telling import Telling

if TYPE_CHECKING:
    from sgld.worker.lanes import Lanes

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """What was merged so far."""

    merged_calls: int = 0
    largest_batch: int = 0


@dataclass
class Session:
    """Starts, runs and cancels tasks.

    :param emit: told each call that waits, each execution and each step; those of one tick together.
    :param ended: told how a task ended; a task's own exception never reaches another.
    :param merges_alone: two calls of one request may share a forward while no other request is there, too. It costs a
        probe and a proof, and pays where a forward of two rows takes less than two forwards.
    :param lanes: of ranks that run several forwards side by side.
    """

    executor: Executor
    emit: Callable[[Sequence[News]], None]
    ended: Callable[[Task, Outcome], None]
    merges_alone: bool = False
    lanes: "Lanes | None" = None
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        self._tasks: dict[str, Task] = {}
        self._jobs: dict[str, Job] = {}
        self._probed: set[str] = set()
        self._exclusive: Task | None = None
        # What waits for its end: outcomes that weren't given to their tasks, and jobs that weren't begun.
        self._held: dict[str, list[tuple[Call, Outcome]]] = {}
        self._deferred: dict[str, Job] = {}
        self._telling = Telling(self.emit, self.executor.clock.now_ns)

    @property
    def is_exclusive(self) -> bool:
        """Whether a task goes on alone, as it changes components."""
        return self._exclusive is not None

    @property
    def is_ahead(self) -> bool:
        """Whether ticks are on their way of which nothing was told."""
        return self._telling.is_ahead

    def start(self, job: Job) -> None:
        """Run a new task to its first call; while an exclusive one goes on, it waits for its end."""
        if self._exclusive is not None:
            self._deferred[job.request_id] = job
            return
        task = task_of(job, self.executor, self._telling.stepped)
        self._tasks[job.request_id], self._jobs[job.request_id] = task, job
        if job.is_whole:
            self._exclusive = task
        was_alone = len(self._tasks) == 2
        self._advance(task)
        if was_alone:
            self._announce_again(except_for=task)
        self._telling.tell()

    def run(
        self,
        call_ids: Sequence[int],
        num_ticks: int = 1,
        is_interrupted: Callable[[float], bool] = lambda wait_s: False,
        ranks: Ranks = FIRST,
    ) -> None:
        """Run calls as one forward and their tasks to the next ones; then those, `num_ticks` times in all.

        It ends early when the next calls don't share a forward, and when `is_interrupted`.

        :param ranks: those that run it, where that is chosen for each forward.
        """
        for tick in range(num_ticks):
            if tick and self.hold(is_interrupted):
                return
            call_ids = self._tick(self._chosen(call_ids), ranks)
            self._telling.tell()
            if not call_ids:
                return

    def begin(self, call_ids: Sequence[int], ranks: Ranks) -> bool:
        """Begin one forward on some of the ranks; `ended_lanes` says when it is over. False: the calls are gone.

        So are those of others while a task goes on alone. Its own aren't begun in their place: they may go on already.
        """
        calls = [call for call in self._waiting(call_ids) if self._may_run(call)]
        if calls:
            assert self.lanes is not None
            self._expect()
            self.executor.runtime.are_changed = self.is_exclusive
            self.lanes.begin(calls, ranks)
        return bool(calls)

    def ended_lanes(self) -> bool:
        """Tell what came of forwards that are over, and run their tasks on; whether there were any."""
        has_ended = False
        for lane, tick in self.lanes.over(self._may_run) if self.lanes is not None else ():
            has_ended = True
            self._telling.free(lane.ranks)
            if tick is None:
                self._telling.tell()
                continue
            # Of requests that were cancelled meanwhile nobody waits for it.
            waiting = [self._is_waiting(call) for call in lane.calls]
            calls = [call for call, waits in zip(lane.calls, waiting, strict=True) if waits]
            outcomes = [outcome for outcome, waits in zip(tick.outcomes, waiting, strict=True) if waits]
            self._ran(calls, replace(tick, outcomes=outcomes, is_timed=tick.is_timed and all(waiting)), lane.ranks)
            self._telling.tell()
        return has_ended

    def _may_run(self, call: Call) -> bool:
        """Whether its task still waits for it, and components are what that expects."""
        return self._is_waiting(call) and self._exclusive in (None, self._tasks.get(call.request_id))

    def _is_waiting(self, call: Call) -> bool:
        task = self._tasks.get(call.request_id)
        return task is not None and call in task.calls

    def _chosen(self, call_ids: Sequence[int]) -> list[Call]:
        # While a component isn't what the others expect, its task is the one that goes on.
        return self._exclusive.calls[:1] if self._exclusive is not None else self._waiting(call_ids)

    def hold(self, is_interrupted: Callable[[float], bool]) -> bool:
        """Wait as long as the device has enough to do; whether something came up until then.

        :param is_interrupted: whether something came up within so many seconds.
        """
        return self._telling.hold(is_interrupted)

    def look(self) -> None:
        """Tell what the device has done by now."""
        self._telling.look()

    def cancel(self, request_id: str) -> None:
        """End a task at the call where it waits; one that has ended is left alone."""
        if (job := self._deferred.pop(request_id, None)) is not None:
            self._tasks[request_id], self._jobs[request_id] = task_of(job, self.executor, self._telling.stepped), job
        self._held.pop(request_id, None)
        task = self._tasks.get(request_id)
        if task is not None:
            task.cancel()
            self._finish(task)
            self._telling.tell()

    def close(self) -> None:
        """Cancel all tasks."""
        for request_id in [*self._deferred, *self._tasks]:
            self.cancel(request_id)

    def _waiting(self, call_ids: Sequence[int]) -> list[Call]:
        wanted = set(call_ids)
        return [call for task in self._tasks.values() for call in task.calls if call.id in wanted]

    def _tick(self, calls: list[Call], ranks: Ranks) -> Sequence[int]:
        """One forward; returns the calls that follow if they can share the next one."""
        if not calls:
            return ()
        if isinstance(calls[0], Stretch):
            return self._stretch(calls[0])
        self._expect()
        self.executor.runtime.are_changed = self.is_exclusive
        self._telling.wait()
        with self.lanes.on(ranks) if self.lanes is not None else nullcontext():
            tick = self.executor.run(calls)
        return self._following(self._ran(calls, tick, ranks), calls[0])

    def _ran(self, calls: Sequence[Call], tick: Tick, ranks: Ranks) -> list[Task]:
        """Tell of a tick and run its tasks on."""
        if not calls:
            return []
        if tick.is_merged:
            self.counters.merged_calls += len(calls)
        self.counters.largest_batch = max(self.counters.largest_batch, len(calls) if tick.is_merged else 1)
        self._telling.ran(calls, tick, ranks if self.lanes is not None else None)
        answers: dict[str, list[tuple[Call, Outcome]]] = {}
        for call, outcome in zip(calls, tick.outcomes, strict=True):
            answers.setdefault(call.request_id, []).append((call, outcome))
        tasks = [self._tasks[request_id] for request_id in answers]
        for task in tasks:
            self._advance(task, answers[task.request_id])
        return tasks

    def _stretch(self, call: Stretch) -> Sequence[int]:
        """Let a task run its models itself, up to its next step."""
        self._telling.wait()
        task, span = self._tasks[call.request_id], self.executor.clock.begin()
        num_compilations = self.executor.runtime.num_compilations
        adapters = everywhere(self._jobs[call.request_id].adapters.values())
        with adapters, self.executor.runtime.unchanging(task.is_exact):
            task.advance(Value(None))
        span.end()
        is_timed = self.executor.runtime.num_compilations == num_compilations
        variant = self.executor.runtime.variant
        tick = Tick([], span, is_merged=False, is_timed=is_timed, cost_key=call.cost_key, variant=variant)
        self._telling.ran([call], tick, FIRST if self.lanes is not None else None)
        self._look_at(task)
        return () if task.end is not None else self._following([task], call)

    def _following(self, tasks: list[Task], ran: Call) -> Sequence[int]:
        """The tasks' next calls, if they are like the one that ran and may share a forward."""
        if any(not task.calls for task in tasks):
            return ()
        following = [call for task in tasks for call in task.calls]
        if len({call.cost_key for call in following} | {ran.cost_key}) > 1:
            return ()
        keys = {self._merge_key(task, call) for task in tasks for call in task.calls} if len(following) > 1 else {""}
        if len(keys) == 1 and None not in keys:
            return [call.id for call in following]
        return [following[0].id] if len(tasks) == 1 else ()

    def _advance(self, task: Task, answers: Sequence[tuple[Call, Outcome]] = ()) -> None:
        """Give a task outcomes of its calls and run it on."""
        if self._exclusive not in (None, task):
            self._held.setdefault(task.request_id, []).extend(answers)
            return
        for call, outcome in answers:
            task.answer(call, outcome)
        known = set(task.calls)
        first_hook = next_hook_id()
        task.advance()
        if task.whole is None and (hooks := range(first_hook, next_hook_id())):
            # Only one task runs at a time, so they are its own: on parts of models, which no proxy stands for.
            task.hook_ids.update(hooks)
            task.exclusive_because = task.exclusive_because or "hooks on parts of its models"
        self._look_at(task, known)

    def _look_at(self, task: Task, known: Collection[Call] = ()) -> None:
        """What became of a task that ran: it has ended, or has calls that weren't known."""
        if task.end is not None:
            self._finish(task)
            return
        self._note_exclusive(task)
        for call in task.calls:
            if call not in known:
                self._announce(task, call)

    def _note_exclusive(self, task: Task) -> None:
        if task.exclusive_because is None or task.call is None:
            return
        verdicts = self.executor.verdicts
        if self._exclusive is None and verdicts.modes.get(task.call.component) != "exclusive":
            logger.warning("requests run one at a time, as the pipeline uses %s", task.exclusive_because)
        self.executor.runtime.changed(task.exclusive_because)
        self._exclusive = task
        verdicts.modes[task.call.component] = "exclusive"
        verdicts.reasons[task.call.component] = f"the pipeline uses {task.exclusive_because}"

    def _finish(self, task: Task) -> None:
        job = self._jobs.pop(task.request_id)
        del self._tasks[task.request_id]
        if task.hook_ids:
            remove_hooks((part for part in vars(job.pipeline).values() if isinstance(part, nn.Module)), task.hook_ids)
        for snapshot in task.snapshots:
            snapshot.restore()
            self.executor.runtime.forget(snapshot.component)
        assert task.end is not None
        if isinstance(task.end, Value) and task.exclusive_because is None and task.whole is None:
            self.executor.verdicts.forget_exclusive()
        if isinstance(task.end, Raised) and not is_cancelled(task.end):
            # Was it the device? Then what failed may be what others gave it, and this raises.
            self.executor.clock.settle()
        self._telling.ended(functools.partial(self.ended, task, task.end))
        if task is self._exclusive:
            self._exclusive = None
            self.executor.runtime.changed(None)
            self._let_others_go_on()

    def _let_others_go_on(self) -> None:
        """What waited for an exclusive task; one of these may be exclusive in turn, then the rest wait again."""
        held, self._held = self._held, {}
        deferred, self._deferred = self._deferred, {}
        for request_id, answers in held.items():
            self._advance(self._tasks[request_id], answers)
        for job in deferred.values():
            self.start(job)

    def _merge_key(self, task: Task, call: Call) -> str | None:
        """What the call shares with those that it may run with. It matters in company only: digests take time."""
        is_alone = len(self._tasks) == 1 and not (self.merges_alone and len(task.calls) > 1)
        job = self._jobs[task.request_id]
        if is_alone or self._exclusive is not None or job.is_exact:
            return None
        self._learn(job, call)
        return self.executor.merge_key(call)

    def _announce(self, task: Task, call: Call) -> None:
        """Tell the scheduler of a call."""
        max_degree, is_bound = self.lanes.degree(call) if self.lanes is not None else (1, True)
        self._telling.pending(
            CallInfo(
                id=call.id,
                request_id=call.request_id,
                kind=call.kind,
                component=call.component,
                merge_key=self._merge_key(task, call),
                cost_key=call.cost_key,
                rows=call.rows,
                step_index=call.step_index,
                num_steps=call.num_steps,
                is_exclusive=task is self._exclusive,
                max_degree=max_degree,
                is_bound=is_bound,
            )
        )

    def _announce_again(self, except_for: Task) -> None:
        for task in list(self._tasks.values()):
            if task is not except_for:
                for call in task.calls:
                    self._announce(task, call)

    def _learn(self, job: Job, call: Call) -> None:
        """Probe each pipeline class once, when a call comes whose axes aren't known."""
        name = type(job.pipeline).__name__
        if self.executor.merges and name not in self._probed and not self.executor.knows(call):
            self._probed.add(name)
            executor = self.executor
            self._expect()
            if self.lanes is not None:
                self.lanes.join()
            executor.verdicts.axes |= probed_axes(job.pipeline, job.kwargs, executor.pulse, executor.runtime)

    def _expect(self) -> None:
        """Tell which components are waited for, so that these stay on the device."""
        awaited = {call.module for task in self._tasks.values() for call in task.calls}
        self.executor.runtime.residency.expect(awaited)
