"""The shift of the noise schedule that a request chooses, against pipelines that were made with it."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
from pipelines import build

from engine.streams import completed, difference, ends_of, events_of, params_of, plain
from sgld.config import EngineConfig
from sgld.engine.engine import Engine
from sgld.events import Completed, Failed
from sgld.testing import InlineReplica

CONFIG = EngineConfig(device="cpu")


def with_shift(name: str, shift: float) -> Any:
    """A pipeline whose noise scheduler was made with this shift."""
    pipeline = build(name)[0]
    key = "shift" if "shift" in pipeline.scheduler.config else "flow_shift"
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **{key: shift})
    return pipeline


@pytest.mark.parametrize(("name", "backend"), [("wan", "auto"), ("sd3", "auto"), ("sd3", "diffusers")])
async def test_results_are_those_of_pipelines_with_these_shifts_alone_and_in_company(
    name: str, backend: Literal["auto", "diffusers"]
) -> None:
    pipeline, kwargs = build(name)
    requests = [params_of(kwargs, flow_shift=shift) for shift in (None, 7.0, 1.5)]
    expected = [plain(pipeline, params_of(kwargs)), *(plain(with_shift(name, s), params_of(kwargs)) for s in (7, 1.5))]
    assert difference(expected[1], expected[2]) > 0
    async with Engine(EngineConfig(device="cpu", backend=backend), rank_factory=InlineReplica(pipeline)) as engine:
        alone = [(await completed(engine, params)).frames for params in requests]
        together = await ends_of(engine, *requests)
    assert [difference(one, right) for one, right in zip(alone, expected, strict=True)] == [0, 0, 0]
    frames = [end.frames for end in together if isinstance(end, Completed)]
    assert [difference(one, right) <= 1 for one, right in zip(frames, expected, strict=True)] == [True] * 3


def with_dynamic_shift() -> Any:
    pipeline = build("flux")[0]
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, use_dynamic_shifting=True)
    return pipeline


@pytest.mark.parametrize(
    ("make", "name", "problem"),
    [
        (lambda: build("sdxl")[0], "sdxl", "EulerDiscreteScheduler has no shift here; that is for flow matching"),
        (with_dynamic_shift, "flux", "shifts by the size of what is generated (use_dynamic_shifting)"),
    ],
)
async def test_shift_that_a_model_does_not_have_is_refused(make: Callable[[], Any], name: str, problem: str) -> None:
    kwargs = build(name)[1]
    async with Engine(CONFIG, rank_factory=InlineReplica(make())) as engine:
        end = (await events_of(engine, params_of(kwargs, flow_shift=3.0)))[-1]
        assert isinstance(end, Failed), end
        assert (end.code, end.message.partition(":")[0]) == ("invalid_request", "flow_shift can't be 3.0")
        assert problem in end.message
        assert isinstance((await events_of(engine, params_of(kwargs)))[-1], Completed)
