"""A task: the program of one request in a thread of its own, which stops where it needs the outcome of a call.

At most one of the executor and the tasks runs at a time. The baton goes to a task with `advance`, which returns when
the task has stopped or has ended: Python threads that run beside an eager forward slow it down several times.
"""

import functools
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from sgld.errors import Cancelled
from sgld.events import Stage
from sgld.messages import CallKind
from sgld.outcome import Outcome, Raised, Value, outcome_of
from sgld.worker.calls import Call
from sgld.worker.randomness import OwnRandom
from sgld.worker.sites import Skips
from sgld.worker.slots import Applied
from sgld.worker.snapshot import Snapshot


class Task:
    """Runs `body(task)` in a thread; inside it, `task.hand_over(call)` waits for the outcome of a call.

    With `post(call)` the body goes on, and waits for the outcome with `wait(call)`, or not at all: so a task may have
    several calls that can run.

    :param seed: where the task's default generators begin.
    :param on_step: told the number of steps done and their total, in the task's thread.
    :param is_exact: its calls run the same kernels for the server's life.
    """

    def __init__(
        self,
        request_id: str,
        body: Callable[["Task"], Any],
        *,
        num_steps: int = 0,
        seed: int = 0,
        on_step: Callable[["Task"], None] = lambda task: None,
        adapters: Mapping[str, Applied] = MappingProxyType({}),
        is_exact: bool = False,
    ) -> None:
        self.request_id = request_id
        self.is_exact = is_exact
        self.step = 0
        self.num_steps = num_steps
        self.stage: Stage = "denoise"
        """Of what it counts the steps."""
        self.has_progress_bar = False
        """The pipeline made one, and tells its steps by it."""
        self.num_calls = 0
        self.skips = Skips()
        self.exclusive_because: str | None = None
        """What the task is about to change in a component that it shares: from here on it must run alone."""
        self.snapshots: list[Snapshot] = []
        """The components that it changes, as they were before."""
        self.hook_ids: set[int] = set()
        """The hooks that it registered in its own thread."""
        self.whole: Callable[[CallKind], Call] | None = None
        """Makes its stretches, where it runs its models itself."""
        self.adapters = adapters
        """Component name to what changes it for this request."""
        self._body: Callable[[Task], Any] | None = body
        self._random = OwnRandom(seed)
        self._on_step = on_step
        # Locks that one thread takes and the other releases: half the time of semaphores, which Python makes of them.
        self._go, self._stopped = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._stopped.acquire()
        self._calls: dict[int, Call] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._call: Call | None = None
        self._end: Outcome | None = None
        self._is_cancelled = False
        self._thread = threading.Thread(target=self._main, name=f"task-{request_id}", daemon=True)
        self._thread.start()

    @property
    def call(self) -> Call | None:
        """The call where the task waits."""
        return self._call

    @property
    def calls(self) -> list[Call]:
        """All calls that have no outcome yet, in order; the task waits for one of them."""
        return list(self._calls.values())

    @property
    def end(self) -> Outcome | None:
        """What the task returned or raised; None while it goes on."""
        return self._end

    def answer(self, call: Call, outcome: Outcome) -> None:
        """Give the task the outcome of one of its calls; it takes note when it runs."""
        del self._calls[call.id]
        if isinstance(outcome, Value):
            # Memory may be too small for what a step cache keeps: its task's problem.
            answered = outcome_of(functools.partial(call.answered, outcome.value))
            outcome = answered if isinstance(answered, Raised) else outcome
        self._outcomes[call.id] = outcome

    def advance(self, outcome: Outcome | None = None) -> None:
        """Run the task until it stops again or ends, unless what it waits for has no outcome.

        :param outcome: that of the call where it waits; None to begin, or where it was given with `answer`.
        """
        assert self._end is None, f"task {self.request_id} has ended"
        if outcome is not None:
            assert self._call is not None, f"task {self.request_id} hasn't begun"
            self.answer(self._call, outcome)
        if self._call is not None and self._call.id in self._calls and not self._is_cancelled:
            return
        self._call = None
        with self._random.entered():
            self._go.release()
            self._stopped.acquire()
        if self._end is not None:
            self._thread.join()

    def cancel(self) -> None:
        """Raise Cancelled at the call where the task waits, and at every further one, until the task has ended."""
        self._is_cancelled = True
        while self._end is None:
            self.advance()

    def hand_over(self, call: Call) -> Any:
        """In the task's thread: wait for the executor to run the call.

        :raises Cancelled: the task is cancelled.
        :raises BaseException: what the component raised.
        """
        self.post(call)
        return self.wait(call)

    def post(self, call: Call) -> None:
        """In the task's thread: let the executor run the call whenever the task stops.

        :raises Cancelled: the task is cancelled.
        """
        if self._is_cancelled:
            raise Cancelled
        call.step_index, call.num_steps, call.random = self.step, self.num_steps, self._random
        call.is_exact = self.is_exact
        self.num_calls += 1
        self._calls[call.id] = call

    def wait(self, call: Call) -> Any:
        """In the task's thread: the result of a call that was posted, once.

        :raises Cancelled: the task is cancelled.
        :raises BaseException: what the component raised.
        """
        self._stop_for(call)
        match self._outcomes.pop(call.id):
            case Value(value=value):
                return value
            case Raised(error=error):
                raise error

    def settle(self) -> None:
        """In the task's thread: wait until each call has its outcome.

        :raises Cancelled: the task is cancelled.
        :raises BaseException: what one of the components raised.
        """
        for call in self.calls:
            self._stop_for(call)
        for outcome in self._outcomes.values():
            if isinstance(outcome, Raised):
                raise outcome.error

    def _stop_for(self, call: Call) -> None:
        if call.id not in self._calls:
            return
        if not self._is_cancelled:
            assert threading.current_thread() is self._thread, "only a task itself may wait for its calls"
            self._call = call
            self._stopped.release()
            self._go.acquire()
        if self._is_cancelled:
            self._calls.clear()
            raise Cancelled

    def began(self, num_steps: int) -> None:
        """In the task's thread: so many denoising steps follow, and a progress bar tells of them.

        :raises Cancelled: the task is cancelled.
        """
        self.step, self.num_steps, self.has_progress_bar = 0, num_steps, True
        self.pause("denoise")

    def stepped(self, step: int, num_steps: int) -> None:
        """In the task's thread: `step` of `num_steps` denoising steps are done.

        :raises Cancelled: the task is cancelled.
        """
        self.step, self.num_steps = step, num_steps
        self._on_step(self)
        self.pause("denoise" if step < num_steps else "decode")

    def processed(self, num_done: int, num_calls: int) -> None:
        """In the task's thread: so many calls are done of those that follow the pipeline."""
        self.stage, self.step, self.num_steps = "postprocess", num_done, num_calls
        self._on_step(self)

    def pause(self, kind: CallKind) -> None:
        """In the task's thread: where it runs whole, stop until the stretch that follows is its turn.

        :raises Cancelled: the task is cancelled.
        """
        if self.whole is not None:
            self.hand_over(self.whole(kind))

    def remember(self, component: nn.Module) -> bool:
        """Take note of a component that it may change, as it is now; :return: whether that is new."""
        is_new = all(snapshot.component is not component for snapshot in self.snapshots)
        if is_new:
            self.snapshots.append(Snapshot(component))
        return is_new

    def _main(self) -> None:
        self._go.acquire()
        self._end = outcome_of(self._run, catches=BaseException)
        # Nothing of a request outlives it, and the body holds the pipeline's arguments.
        self._body = None
        self._calls.clear()
        self._stopped.release()

    def _run(self) -> Any:
        assert self._body is not None
        if self._is_cancelled:
            raise Cancelled
        result = self._body(self)
        # It may hold results that nobody has touched yet.
        self.settle()
        return result


def is_cancelled(outcome: Outcome) -> bool:
    """Whether a task ended because it was told to."""
    return isinstance(outcome, Raised) and isinstance(outcome.error, Cancelled)
