"""A task: the program of one request in a thread of its own, which stops at each of its calls.

At most one of the executor and the tasks runs at a time. The baton goes to a task with `advance`, which returns when
the task has stopped at its next call or has ended: Python threads that run beside an eager forward slow it down
several times.
"""

import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sgld.errors import Cancelled
from sgld.worker.calls import Call
from sgld.worker.snapshot import Snapshot


@dataclass(frozen=True)
class Value:
    """A call or a task returned this."""

    value: Any


@dataclass(frozen=True)
class Raised:
    """A call or a task raised this."""

    error: BaseException


Outcome = Value | Raised


class Task:
    """Runs `body(task)` in a thread; inside it, `task.hand_over(call)` waits for the outcome of a call.

    :param on_step: told the number of steps done and their total, in the task's thread.
    """

    def __init__(
        self,
        request_id: str,
        body: Callable[["Task"], Any],
        *,
        num_steps: int = 0,
        on_step: Callable[["Task"], None] = lambda task: None,
    ) -> None:
        self.request_id = request_id
        self.step = 0
        self.num_steps = num_steps
        self.num_calls = 0
        self.exclusive_because: str | None = None
        """What the task is about to change in a component that it shares: from here on it must run alone."""
        self.snapshots: list[Snapshot] = []
        """The components that it changes, as they were before."""
        self._body: Callable[[Task], Any] | None = body
        self._on_step = on_step
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._outcome: Outcome | None = None
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
    def end(self) -> Outcome | None:
        """What the task returned or raised; None while it goes on."""
        return self._end

    def advance(self, outcome: Outcome | None = None) -> None:
        """Give the task the outcome of its call (None to begin), and run it until it stops again or ends."""
        assert self._end is None, f"task {self.request_id} has ended"
        assert (outcome is None) == (self._call is None), f"task {self.request_id} waits for {self._call}"
        self._outcome, self._call = outcome, None
        self._go.release()
        self._stopped.acquire()
        if self._end is not None:
            self._thread.join()

    def cancel(self) -> None:
        """Raise Cancelled at the call where the task waits, and at every further one, until the task has ended."""
        self._is_cancelled = True
        while self._end is None:
            self.advance(Raised(Cancelled()) if self._call else None)

    def hand_over(self, call: Call) -> Any:
        """In the task's thread: wait for the executor to run the call.

        :raises Cancelled: the task is cancelled.
        :raises BaseException: what the component raised.
        """
        if self._is_cancelled:
            raise Cancelled
        call.step_index, call.num_steps = self.step, self.num_steps
        self.num_calls += 1
        self._call = call
        self._stopped.release()
        self._go.acquire()
        outcome, self._outcome = self._outcome, None
        match outcome:
            case Value(value=value):
                return value
            case Raised(error=error):
                raise error
            case None:
                raise AssertionError("resumed without an outcome")

    def stepped(self, step: int, num_steps: int) -> None:
        """In the task's thread: `step` of `num_steps` denoising steps are done."""
        self.step, self.num_steps = step, num_steps
        self._on_step(self)

    def _main(self) -> None:
        self._go.acquire()
        self._end = self._run()
        # Nothing of a request outlives it: the body holds the pipeline's arguments, a traceback all that was local.
        self._body = None
        if isinstance(self._end, Raised):
            _forget_locals(self._end.error)
        self._stopped.release()

    def _run(self) -> Outcome:
        assert self._body is not None
        try:
            if self._is_cancelled:
                raise Cancelled
            return Value(self._body(self))
        except BaseException as error:  # noqa: BLE001 - the task's boundary: whatever a pipeline raises is its outcome
            return Raised(error)


def _forget_locals(error: BaseException | None) -> None:
    """Clear the frames of an exception and of those that led to it; they still print."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
