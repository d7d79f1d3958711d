"""From a request whose adapters and filters are there to the job of its task, and what delivers its results."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sgld.errors import InvalidRequest
from sgld.media.images import load_image
from sgld.media.inputs import has_pictures
from sgld.messages import Start
from sgld.models.filters import Filter
from sgld.sampling_params import FirstBlockCache, SamplingParams
from sgld.worker.arguments import arguments, num_steps, with_pictures
from sgld.worker.delivery import Delivery
from sgld.worker.job import Job
from sgld.worker.preview import Previewer
from sgld.worker.results import Results
from sgld.worker.runtime import Runtime
from sgld.worker.slots import Applied
from sgld.worker.task import Task

if TYPE_CHECKING:
    from sgld.models.load import LoadedModel


@dataclass(frozen=True)
class Preparation:
    """Makes the jobs of one rank."""

    model: "LoadedModel"
    results: Results
    previewer: Previewer
    runtime: Runtime

    def job_of(
        self, asked: Start, adapters: Mapping[str, Applied], filters: tuple[Filter, ...]
    ) -> tuple[Job, Delivery]:
        """What a request runs, and what delivers the results of that.

        :raises InvalidRequest: it can't be done as asked.
        """
        params = asked.params
        self._check_cache(params)
        pipeline, kwargs = self._bound(params)
        steps = num_steps(pipeline, kwargs)
        asked.limits.check_asked(
            params,
            self.model.call_defaults,
            has_pictures=has_pictures(params),
            makes_videos=self.model.makes_videos,
            num_steps=steps,
        )
        # A task that runs its models itself has the cores.
        num_threads = torch.get_num_threads() if self.model.is_whole else 1
        about = self.results, asked, self.model, self.previewer
        delivery = Delivery(*about, num_threads=num_threads, filters=filters, runtime=self.runtime)
        job = Job(
            asked.request_id,
            pipeline,
            kwargs,
            num_steps=steps,
            is_exact=params.exact,
            cache=params.cache,
            is_whole=self.model.is_whole,
            adapters=adapters,
            prepare=functools.partial(self._prepare, delivery, steps),
            finish=delivery.finish,
        )
        return job, delivery

    def _check_cache(self, params: SamplingParams) -> None:
        if self.model.is_whole and params.cache is not None:
            raise InvalidRequest("cache is of sgld's engine, but this model runs with --backend diffusers", "cache")
        if self.runtime.ranks is not None and isinstance(params.cache, FirstBlockCache):
            raise InvalidRequest("cache method first_block needs a single GPU; with several there is taylor", "cache")

    def _bound(self, params: SamplingParams) -> tuple[Any, dict[str, Any]]:
        """The pipeline for a request, and what it is called with."""
        images = [load_image(Path(path)) for path in params.image_path]
        pipeline = self.model.pipeline_for({*params.diffusers_kwargs, *(["image"] if images else [])})
        return pipeline, with_pictures(arguments(pipeline, params, self.model.defaults, images))

    def _prepare(self, delivery: Delivery, num_steps: int, task: Task, bound: Any) -> None:
        """In the task's thread, before its pipeline runs."""
        if self.model.refresh is not None:
            self.model.refresh(num_steps)
        delivery.prepare(task, bound)
