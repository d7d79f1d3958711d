"""What a task is to run, its task, and what tells how long it takes."""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sgld.sampling_params import StepCacheParams
from sgld.worker.binding import bind, bind_whole, release
from sgld.worker.calls import Stretch
from sgld.worker.executor import Executor
from sgld.worker.slots import Applied
from sgld.worker.task import Task

# Arguments whose numbers tell how long a step takes. Of others it matters that they are given, of some not even that.
_COUNTS = ("height", "width", "num_frames", "num_images_per_prompt", "num_videos_per_prompt", "max_sequence_length")
_OF_NO_SIZE = ("generator", "num_inference_steps", "output_type")


@dataclass(frozen=True)
class Job:
    """What a task runs: a pipeline with arguments.

    `prepare` is given the task and its bound pipeline before, `finish` what runs it: its result is large, and nobody
    else holds it. An exact one shares no forward, not even between its own calls. One that is whole runs its models
    itself, while no other runs.
    `adapters`: component name to what changes it.
    """

    request_id: str
    pipeline: Any
    kwargs: dict[str, Any]
    num_steps: int = 0
    is_exact: bool = False
    cache: StepCacheParams | None = None
    is_whole: bool = False
    adapters: Mapping[str, Applied] = field(default_factory=dict)
    prepare: Callable[[Task, Any], None] = lambda task, bound: None
    finish: Callable[[Callable[[], Any]], Any] = lambda run: run()


def task_of(job: Job, executor: Executor, on_step: Callable[[Task], None]) -> Task:
    """The task of a job; it hasn't begun.

    :param executor: runs its calls.
    """
    return Task(
        job.request_id,
        functools.partial(_run_whole if job.is_whole else _run, job, executor),
        num_steps=job.num_steps,
        seed=seed_of(job),
        on_step=on_step,
        adapters=job.adapters,
        is_exact=job.is_exact,
    )


def _run(job: Job, executor: Executor, task: Task) -> Any:
    """In the task's thread: the pipeline, whose calls are handed over."""
    defers = executor.merges and not job.is_exact
    bound = bind(job.pipeline, task, defers=defers, cache=job.cache, runtime=executor.runtime)
    try:
        job.prepare(task, bound)
        return job.finish(functools.partial(bound, **job.kwargs))
    finally:
        release(bound)


def _run_whole(job: Job, executor: Executor, task: Task) -> Any:
    """In the task's thread: the pipeline, which runs its models itself."""
    task.whole = functools.partial(Stretch, job.request_id, type(job.pipeline).__name__, size_of(job.kwargs))
    bound = bind_whole(job.pipeline, task, seldom(executor.pulse))
    try:
        job.prepare(task, bound)
        task.pause("encode")
        # What it complains of before its first step are its arguments.
        task.num_calls = 0
        return job.finish(functools.partial(bound, **job.kwargs))
    finally:
        release(bound)


def seldom(pulse: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> Callable[[], None]:
    """The same, but not called again within a second."""
    next_s = 0.0

    def called() -> None:
        nonlocal next_s
        if clock() >= next_s:
            next_s = clock() + 1.0
            pulse()

    return called


def size_of(kwargs: Mapping[str, Any]) -> str:
    """What of the arguments tells how long a step of a whole pipeline takes."""
    counts = [f"{name}={value}" for name, value in sorted(kwargs.items()) if name in _COUNTS and value is not None]
    others = [
        name for name, value in sorted(kwargs.items()) if name not in (*_COUNTS, *_OF_NO_SIZE) and value is not None
    ]
    return ",".join([*counts, *others])


def seed_of(job: Job) -> int:
    """Where the default generators of its task begin."""
    generator = job.kwargs.get("generator")
    return generator.initial_seed() if isinstance(generator, torch.Generator) else 0
