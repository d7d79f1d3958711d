"""What a task is to run, and what of it tells how long it takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sgld.sampling_params import StepCacheParams
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
