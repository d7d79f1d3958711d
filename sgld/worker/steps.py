"""Watching a noise scheduler's `step`, on the copy that belongs to one task."""

import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from sgld.errors import InvalidRequest
from sgld.models.noise import Unshiftable, shifted
from sgld.worker.task import Task

Around = Callable[..., Any]
"""Called with the step that is watched and what it is given; returns its result."""


class WatchedStep:
    """Stands in the place of a noise scheduler's `step`. A deep copy of the scheduler has its own, unwatched one.

    Some pipelines copy it for their sound: the copy's steps must not be those of the original.
    """

    def __init__(self, scheduler: Any, around: Around) -> None:
        # Pipelines look at the signature of `step` to see what it takes. First, as it copies attributes, too.
        functools.update_wrapper(self, scheduler.step)
        self._scheduler = scheduler
        self._step = scheduler.step
        self._around = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self._step, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self._scheduler)]
        return MethodType(type(copied).step, copied)


def schedulers_of(bound: Any) -> Iterator[Any]:
    """The noise schedulers of a bound pipeline."""
    for name, value in list(vars(bound).items()):
        if name.endswith("scheduler") and hasattr(value, "step"):
            yield value


def shift_noise(bound: Any, shift: float) -> None:
    """Give a task's own noise scheduler another shift.

    :raises InvalidRequest: it has none.
    """
    own = getattr(bound, "scheduler", None)
    if own is None:
        raise InvalidRequest(f"flow_shift is {shift}, but the pipeline has no scheduler", "flow_shift")
    try:
        fresh = shifted(own, shift)
    except Unshiftable as error:
        raise InvalidRequest(f"flow_shift can't be {shift}: {error}", "flow_shift") from None
    # In its place, as others refer to it.
    vars(own).clear()
    vars(own).update(vars(fresh))


def count_steps(task: Task, bound: Any) -> None:
    """Tell a task its steps by its noise scheduler, as long as no progress bar does: some pipelines have none."""
    scheduler = next(schedulers_of(bound), None)
    if scheduler is None:
        return
    num_done = 0

    def counted(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal num_done
        result = step(*args, **kwargs)
        if not task.has_progress_bar:
            num_done += 1
            total = len(scheduler.timesteps) if getattr(scheduler, "timesteps", None) is not None else task.num_steps
            task.stepped(num_done, max(total, num_done))
        return result

    scheduler.step = WatchedStep(scheduler, counted)
