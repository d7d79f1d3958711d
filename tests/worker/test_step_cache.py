"""Steps that a request skips: with which results, in whose company, and what isn't cached at all."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.hooks import TaylorSeerCacheConfig
from pipelines import build
from torch import nn

from sgld.errors import InvalidRequest
from sgld.sampling_params import FirstBlockCache, StepCacheParams, TaylorCache
from sgld.testing import Report, run_together
from sgld.worker.binding import bind
from sgld.worker.step_cache import StepCache
from sgld.worker.task import Task
from worker.requests import Sum, calls_until_end, picture, request

TOLERANCE = 1e-5


def run(name: str, caches: Sequence[StepCacheParams | None], **kwargs: Any) -> tuple[Report, list[Report]]:
    """Requests with these caches together, and each alone."""
    pipeline, suited = build(name)

    def made() -> list[dict[str, Any]]:
        return [request(name, i, suited | kwargs, num_inference_steps=7 + i) for i in range(len(caches))]

    alone = [run_together(pipeline, [r], caches=[c]) for r, c in zip(made(), caches, strict=True)]
    return run_together(pipeline, made(), caches=caches), alone


def assert_equal(together: Report, alone: list[Report]) -> None:
    for one, other in zip(together.outputs, alone, strict=True):
        torch.testing.assert_close(picture(one), picture(other.outputs[0]), rtol=0, atol=TOLERANCE)
    assert together.skipped_calls == [report.skipped_calls[0] for report in alone]


@pytest.mark.parametrize("name", ["flux_true_cfg", "qwen_image", "sdxl"])
def test_company_changes_nothing_of_extrapolated_steps(name: str) -> None:
    together, alone = run(name, [TaylorCache(interval=2, order=0), None, TaylorCache(interval=4, order=2)])

    assert_equal(together, alone)
    assert together.mode == "merge"
    assert together.skipped_calls[1] == 0
    assert min(together.skipped_calls[0], together.skipped_calls[2]) >= 2


@pytest.mark.parametrize("name", ["flux_true_cfg", "wan", "qwen_image"])
def test_rows_that_skip_after_their_first_block_leave_the_others(name: str) -> None:
    """Thresholds apart, so that in one forward some skip and others don't."""
    caches = [FirstBlockCache(threshold=threshold, warmup_steps=1, max_skips=2) for threshold in (1e-6, 0.2, 5.0)]
    together, alone = run(name, caches)

    assert_equal(together, alone)
    assert together.parted_forwards > 0
    assert together.skipped_calls[0] == 0
    assert together.skipped_calls[2] >= 5


def test_calls_with_and_without_first_blocks_run_beside_each_other() -> None:
    together, alone = run("flux", [FirstBlockCache(threshold=5.0), None, FirstBlockCache(threshold=5.0), None])

    assert_equal(together, alone)
    assert together.mode == "merge"


def test_extrapolation_is_that_of_diffusers() -> None:
    """Its lite mode predicts what the last layer returns; at interval 2 it computes the same steps."""
    pipeline, kwargs = build("flux")
    own = run_together(
        pipeline, [request("flux", 0, kwargs, num_inference_steps=9)], caches=[TaylorCache(interval=2, order=1)]
    )
    config = TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=3,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    )
    pipeline.transformer.enable_cache(config)
    expected = pipeline(**request("flux", 0, kwargs, num_inference_steps=9))

    assert own.skipped_calls == [3]
    torch.testing.assert_close(picture(own.outputs[0]), picture(expected), rtol=0, atol=TOLERANCE)


def test_both_calls_of_a_guided_step_still_share_forwards() -> None:
    pipeline, kwargs = build("flux_true_cfg")
    lone = run_together(
        pipeline, [request("flux_true_cfg", 0, kwargs, num_inference_steps=12)], caches=[TaylorCache(interval=2)]
    )

    assert lone.largest_batch == 2
    assert lone.skipped_calls == [2 * 5]


class Ramp(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A denoiser that returns its timestep."""

    config_name = "config.json"

    def __init__(self, *, extra: object = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.num_calls = 0
        self.extra = extra

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, state: object = None) -> tuple[Any, ...]:
        self.num_calls += 1
        return (self.weight * timestep + 0 * x, *([self.extra] if self.extra is not None else []))


class Ramps(DiffusionPipeline):  # type: ignore[misc]
    """Denoises in two loops, whose steps are all alike; what it returns are all outputs of its denoiser."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)

    @torch.no_grad()
    def __call__(self, scales: Sequence[float] = (1.0, -3.0), num_inference_steps: int = 6, state: Any = None) -> Sum:
        made = []
        for scale in scales:
            with self.progress_bar(total=num_inference_steps) as bar:
                for step in range(num_inference_steps):
                    kwargs = {} if state is None else {"state": state}
                    output = self.transformer(torch.zeros(1, 2), torch.tensor([scale * step]), **kwargs)[0]
                    made.append(output.clone())
                    output.fill_(100.0)  # it is the pipeline's to write to
                    bar.update()
        return Sum(images=torch.cat(made))


def test_a_loop_that_begins_again_knows_nothing_of_the_last_one() -> None:
    model = Ramp()
    report = run_together(Ramps(model), [{}], caches=[TaylorCache(interval=3, order=1, warmup_steps=2)])

    # Each loop computes steps 0, 1 and 4, and continues straight lines exactly.
    assert (model.num_calls, report.skipped_calls) == (6, [6])
    expected = torch.tensor([scale * step for scale in (1.0, -3.0) for step in range(6)])
    torch.testing.assert_close(picture(report.outputs[0])[:, 0], expected)


def test_requests_know_nothing_of_each_other() -> None:
    pipeline = Ramps(Ramp())
    caches = [TaylorCache(interval=3, order=0, warmup_steps=1)] * 2
    kwargs = [{"scales": (1.0,)}, {"scales": (5.0,)}]
    together = run_together(pipeline, kwargs, caches=caches)

    ramp = torch.tensor([0.0, 0.0, 0.0, 3.0, 3.0, 3.0])
    for output, scale in zip(together.outputs, (1.0, 5.0), strict=True):
        torch.testing.assert_close(picture(output)[:, 0], scale * ramp)


def test_a_request_leaves_nothing_behind() -> None:
    pipeline, kwargs = build("flux")
    caches: list[weakref.ref[StepCache]] = []
    init = StepCache.__init__

    def noted(cache: StepCache, task: Task, params: StepCacheParams) -> None:
        init(cache, task, params)
        caches.append(weakref.ref(cache))

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StepCache, "__init__", noted)
            run_together(pipeline, [request("flux", 0, kwargs)], caches=[FirstBlockCache()])
        assert len(caches) == 1
        assert caches[0]() is None
    finally:
        gc.enable()


def test_skipped_calls_are_never_handed_over() -> None:
    pipeline, kwargs = build("flux")

    def body(task: Task) -> Any:
        bound = bind(pipeline, task, cache=TaylorCache(interval=3, warmup_steps=2))
        return bound(**request("flux", 0, kwargs, num_inference_steps=8))

    task = Task("request", body)
    task.advance()
    steps = [call.step_index for call in calls_until_end(task) if call.component == "transformer"]
    assert steps == [0, 1, 4, 7]
    assert task.skips.num == 4


def problem_of(pipeline: Any, kwargs: dict[str, Any], cache: StepCacheParams) -> str:
    (output,) = run_together(pipeline, [kwargs], caches=[cache]).outputs
    assert isinstance(output, InvalidRequest)
    return str(output)


def test_pipeline_that_changes_its_models_is_refused() -> None:
    pipeline, kwargs = build("pixart_pag")
    message = problem_of(pipeline, request("pixart_pag", 0, kwargs), TaylorCache())
    assert "changes its models while it runs" in message


def test_arguments_with_a_state_are_refused() -> None:
    assert "is given a list_iterator (state)" in problem_of(Ramps(Ramp()), {"state": iter([])}, TaylorCache())


def test_results_with_a_state_are_refused() -> None:
    assert "returns more than tensors" in problem_of(Ramps(Ramp(extra=object())), {}, TaylorCache())


class Prepared(Ramps):
    """Another model of diffusers runs before the loop, and is given what nobody knows."""

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = 4) -> Sum:  # type: ignore[override]
        self.transformer(torch.zeros(1, 2), torch.zeros(1), state=iter([]))
        return super().__call__((1.0,), num_inference_steps)


def test_models_that_run_before_the_loop_are_left_alone() -> None:
    report = run_together(Prepared(Ramp()), [{}], caches=[TaylorCache(warmup_steps=1, interval=4)])

    assert isinstance(report.outputs[0], Sum)
    assert report.skipped_calls == [3]
