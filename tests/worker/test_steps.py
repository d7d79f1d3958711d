import copy
import inspect
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler

from sgld.worker.binding import ProgressBar
from sgld.worker.steps import WatchedStep, count_steps, schedulers_of
from sgld.worker.task import Task


def ready(scheduler: Any, num_steps: int = 3) -> Any:
    scheduler.set_timesteps(num_steps)
    return scheduler


def walk(scheduler: Any) -> torch.Tensor:
    """All steps from one noise, with a model that predicts half of its input."""
    sample = torch.ones(1, 4, 2, 2)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(0.5 * sample, timestep, sample, return_dict=False)[0]
    return sample


def passed(task: Task, bound: Any) -> list[tuple[int, int]]:
    """The steps that a task is told while its scheduler walks."""
    told: list[tuple[int, int]] = []
    task._on_step = lambda task: told.append((task.step, task.num_steps))
    count_steps(task, bound)
    walk(bound.scheduler)
    task.cancel()
    return told


def test_steps_are_counted_where_there_is_no_progress_bar() -> None:
    bound = SimpleNamespace(scheduler=ready(EulerDiscreteScheduler(), 4))
    assert passed(Task("request", lambda task: None), bound) == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_steps_of_second_order_are_all_counted() -> None:
    bound = SimpleNamespace(scheduler=ready(HeunDiscreteScheduler(), 3))
    assert passed(Task("request", lambda task: None), bound) == [(n, 5) for n in range(1, 6)]


def test_progress_bar_comes_first() -> None:
    task = Task("request", lambda task: None)
    ProgressBar(task, 3)
    assert passed(task, SimpleNamespace(scheduler=ready(EulerDiscreteScheduler()))) == []


def test_pipeline_without_a_noise_scheduler_is_left_alone() -> None:
    task = Task("request", lambda task: None)
    count_steps(task, SimpleNamespace(scheduler=None, vae=1))
    task.cancel()


def test_watched_step_looks_like_the_real_one() -> None:
    scheduler = ready(FlowMatchEulerDiscreteScheduler())
    expected = inspect.signature(scheduler.step)
    scheduler.step = WatchedStep(scheduler, lambda step, *args, **kwargs: step(*args, **kwargs))
    assert inspect.signature(scheduler.step) == expected
    assert list(schedulers_of(SimpleNamespace(scheduler=scheduler, other_scheduler=3))) == [scheduler]


def test_copy_of_a_watched_scheduler_steps_by_itself() -> None:
    expected = walk(ready(FlowMatchEulerDiscreteScheduler()))
    seen = []

    def watched(step: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(args[1])
        return step(*args, **kwargs)

    scheduler = ready(FlowMatchEulerDiscreteScheduler())
    for _ in range(2):
        scheduler.step = WatchedStep(scheduler, watched)
    copied = copy.deepcopy(scheduler)
    assert torch.equal(walk(copied), expected)
    assert seen == []
    assert scheduler.step_index is None
    assert torch.equal(walk(scheduler), expected)
    assert len(seen) == 6
