"""From a request to the job of its task."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from pipelines import build

from sgld.errors import InvalidRequest
from sgld.messages import Start
from sgld.models.load import LoadedModel
from sgld.request import Limits
from sgld.sampling_params import FirstBlockCache, SamplingParams, StepCacheParams, TaylorCache
from sgld.worker.preparation import Preparation
from sgld.worker.preview import Previewer
from sgld.worker.runtime import Runtime


def preparation(*, is_whole: bool = False, has_ranks: bool = False) -> Preparation:
    pipeline, _ = build("pixart")
    model = LoadedModel(pipeline, torch.device("cpu"), {"num_inference_steps": 7}, "pixart", is_whole=is_whole)
    runtime = Runtime()
    runtime.ranks = object() if has_ranks else None  # type: ignore[assignment]
    return Preparation(model, None, Previewer(), runtime)  # type: ignore[arg-type]


def asked(**chosen: Any) -> Start:
    return Start(request_id="a", params=SamplingParams(prompt="a cat", **chosen))


def test_job_has_what_was_chosen_and_what_the_author_recommends() -> None:
    job, delivery = preparation().job_of(asked(height=8, exact=True), {}, ())
    assert (job.request_id, job.num_steps, job.is_exact, job.is_whole) == ("a", 7, True, False)
    assert (job.kwargs["prompt"], job.kwargs["height"]) == ("a cat", 8)
    assert delivery.notes == ()


def test_steps_that_the_model_chooses_are_limited_before_anything_runs() -> None:
    limited = msgspec.structs.replace(asked(), limits=Limits(max_steps=6))
    with pytest.raises(InvalidRequest, match="the number of steps is 7; this server allows at most 6"):
        preparation().job_of(limited, {}, ())


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        (Limits(max_pixels=63), "the number of pixels is 64"),
        (Limits(max_frames=2), "the number of frames is 3"),
        (Limits(max_total_pixels=100), "3 frames of 64 pixels each, and such a file has at most 1"),
        (Limits(only_videos=True), "makes no videos"),
    ],
)
def test_what_the_model_chooses_is_limited_before_anything_runs(limits: Limits, problem: str) -> None:
    prepared = preparation()
    model = replace(prepared.model, call_defaults={"width": 8, "height": 8, "num_frames": 3})
    limited = msgspec.structs.replace(asked(), limits=limits)
    with pytest.raises(InvalidRequest, match=problem):
        replace(prepared, model=model).job_of(limited, {}, ())


@pytest.mark.parametrize(
    ("cache", "where", "problem"),
    [
        (TaylorCache(), {"is_whole": True}, "--backend diffusers"),
        (FirstBlockCache(), {"has_ranks": True}, "single GPU"),
    ],
    ids=["whole", "several ranks"],
)
def test_cache_that_can_not_be_is_refused(cache: StepCacheParams, where: dict[str, bool], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        preparation(**where).job_of(asked(cache=cache), {}, ())


def test_each_rank_may_extrapolate() -> None:
    job, _ = preparation(has_ranks=True).job_of(asked(cache=TaylorCache()), {}, ())
    assert job.cache == TaylorCache()
