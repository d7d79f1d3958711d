from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import build

from sgld.errors import InvalidRequest
from sgld.testing import run_together
from sgld.worker.binding import ProgressBar, bind
from sgld.worker.task import Task
from worker.requests import Doubling, Doublings, Sum, calls_until_end, picture, request, run_to_end, running


def bound_to(pipeline: Any) -> Any:
    """A copy for a task that has ended: to look at, not to call."""
    return bind(pipeline, running(lambda _task: None))


def test_two_requests_have_noise_schedulers_of_their_own() -> None:
    pipeline, _ = build("flux")
    one, two = bound_to(pipeline), bound_to(pipeline)
    assert len({id(bound.scheduler) for bound in (one, two, pipeline)}) == 3
    one.scheduler.set_timesteps(7)
    assert [len(bound.scheduler.timesteps) for bound in (one, two, pipeline)] == [7, 1000, 1000]


def test_components_are_proxies_of_the_same_modules() -> None:
    pipeline, _ = build("flux")
    bound = bound_to(pipeline)
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        assert getattr(bound, name).real is getattr(pipeline, name)
    assert bound.tokenizer is pipeline.tokenizer
    assert set(bound.components) == set(pipeline.components)
    assert (bound.device, bound.dtype) == (pipeline.device, pipeline.dtype)


def test_missing_components_stay_none() -> None:
    pipeline, _ = build("wan")
    assert bound_to(pipeline).transformer_2 is None


def test_state_that_a_call_leaves_on_the_pipeline_is_that_of_its_copy() -> None:
    pipeline, kwargs = build("flux")
    before = dict(vars(pipeline))
    run_to_end(running(lambda task: bind(pipeline, task)(**request("flux", 0, kwargs))))
    assert vars(pipeline) == before
    assert not hasattr(pipeline, "_guidance_scale")


class Nested(DiffusionPipeline):  # type: ignore[misc]
    """A pipeline that holds another, and shares its denoiser, as combined pipelines do."""

    def __init__(self, inner: DiffusionPipeline, transformer: Doubling) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)
        self.inner = inner

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, num_inference_steps: int = 2, output_type: str = "pt") -> Any:
        x = self.inner(x, num_inference_steps=num_inference_steps).images
        return Sum(images=self.transformer(x))


def test_nested_pipelines_are_bound_too() -> None:
    transformer = Doubling()
    inner = Doublings(transformer)
    pipeline = Nested(inner, transformer)
    task = running(lambda task: bind(pipeline, task)(torch.ones(1, 2)))

    components = [call.component for call in calls_until_end(task)]

    assert len(components) == 3
    assert run_to_end(task).images.tolist() == [[8.0, 8.0]]
    assert pipeline.inner is inner
    assert inner.transformer is transformer


def test_what_appears_twice_is_one_copy() -> None:
    transformer = Doubling()
    bound = bound_to(Nested(Doublings(transformer), transformer))
    assert bound.inner.transformer is bound.transformer
    assert bound.inner is not None


def test_nested_pipelines_run_together() -> None:
    transformer = Doubling()
    pipeline = Nested(Doublings(transformer), transformer)
    report = run_together(pipeline, [{"x": torch.full((1, 2), float(index))} for index in range(4)])
    assert [picture(output).tolist() for output in report.outputs] == [[[8.0 * i, 8.0 * i]] for i in range(4)]
    assert report.largest_batch == 4


def test_model_hooks_are_left_alone() -> None:
    """The real method moves offloaded models, under the other requests' feet."""
    pipeline, _ = build("flux")
    pipeline._all_hooks = ["a hook"]
    assert bound_to(pipeline).maybe_free_model_hooks() is None


def test_modular_pipelines_have_guiders_and_blocks_of_their_own() -> None:
    pipeline, _ = build("modular_qwen_image")
    one, two = bound_to(pipeline), bound_to(pipeline)
    for name in ("guider", "scheduler", "_blocks"):
        assert len({id(getattr(bound, name)) for bound in (one, two, pipeline)}) == 3
    assert one.transformer.real is pipeline.transformer
    assert set(one.components) == set(pipeline.components)


class StableDiffusionDiffEditPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Has the name of one that differentiates."""


class Own(StableDiffusionDiffEditPipeline):
    """A pipeline derived from it."""


@pytest.mark.parametrize("pipeline_class", [StableDiffusionDiffEditPipeline, Own])
def test_pipeline_that_needs_gradients_is_refused_by_name(pipeline_class: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"{pipeline_class.__name__} needs gradients inside its __call__"):
        bound_to(pipeline_class())


def told(body: Any, num_steps: int = 0) -> tuple[list[tuple[int, int]], Any]:
    """The steps that a body told its task, and what it returned."""
    steps: list[tuple[int, int]] = []
    task = running(body, num_steps=num_steps, on_step=lambda task: steps.append((task.step, task.num_steps)))
    return steps, run_to_end(task)


def test_progress_bar_with_a_total_tells_each_update() -> None:
    def body(task: Task) -> int:
        with ProgressBar(task, 4) as bar:
            bar.update()
            bar.update(2)
            bar.set_postfix(loss=1)
            bar.set_description("decoding")
            bar.update()
        return bar.n

    assert told(body) == ([(1, 4), (3, 4), (4, 4)], 4)


@pytest.mark.parametrize("iterable", [[5, 6, 7], torch.tensor([5, 6, 7]), range(5, 8)])
def test_progress_bar_around_an_iterable_tells_each_item(iterable: Any) -> None:
    pipeline, _ = build("flux")

    def body(task: Task) -> list[int]:
        return [int(item) for item in bind(pipeline, task).progress_bar(iterable)]

    assert told(body) == ([(1, 3), (2, 3), (3, 3)], [5, 6, 7])


def test_progress_bar_around_an_iterator_has_the_steps_of_the_request() -> None:
    pipeline, _ = build("flux")

    def body(task: Task) -> list[int]:
        return list(bind(pipeline, task).progress_bar(iter([1, 2])))

    assert told(body, num_steps=2) == ([(1, 2), (2, 2)], [1, 2])


@pytest.mark.parametrize("name", ["flux", "modular_flux"])
def test_progress_bar_shows_nothing(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    pipeline, kwargs = build(name)
    pipeline.set_progress_bar_config(disable=False)
    run_to_end(running(lambda task: bind(pipeline, task)(**request(name, 0, kwargs))))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["flux", "sdxl", "wan", "cogvideox", "modular_flux", "modular_wan"])
def test_every_step_is_told_before_the_last_call(name: str) -> None:
    pipeline, kwargs = build(name)
    task = running(lambda task: bind(pipeline, task)(**request(name, 1, kwargs)))
    seen = [(call.step_index, call.num_steps) for call in calls_until_end(task) if call.kind != "encode"]
    assert [step for step, _ in dict.fromkeys(seen)] == [0, 1, 2, 3, 4]
    assert {num_steps for _, num_steps in seen} == {4}
