"""Results that materialise when touched: promised tensors, and which calls get them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from pipelines import build
from torch import nn

from sgld.outcome import Raised, Value
from sgld.testing import run_together
from sgld.worker.binding import bind
from sgld.worker.calls import Call
from sgld.worker.deferred import Deferred, Promise, forced, outline_of
from sgld.worker.executor import single
from sgld.worker.task import Task
from worker.requests import Doubling, Sum, calls_until_end, picture, request

VALUE = torch.arange(24.0).reshape(2, 3, 4)


class Late:
    """A result that is fetched once; counts how often it was."""

    def __init__(self, value: Any) -> None:
        self.num_waits = 0
        self._value = value

    def __call__(self) -> Any:
        self.num_waits += 1
        return self._value


def promised(value: torch.Tensor = VALUE, outline_from: torch.Tensor | None = None) -> tuple[Any, Late]:
    """A promised tensor, and what tells whether it was waited for."""
    late = Late((value.clone(),))
    outline = outline_of((value if outline_from is None else outline_from,))
    return Promise(outline, late).tree()[0], late


def test_what_a_tensor_is_can_be_asked_without_waiting() -> None:
    tensor, late = promised()
    assert isinstance(tensor, torch.Tensor)
    assert (tensor.shape, tensor.dtype, tensor.device.type) == (VALUE.shape, VALUE.dtype, "cpu")
    assert tensor.stride() == VALUE.stride()
    assert tensor.size(1) == 3
    assert late.num_waits == 0


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "slice": lambda x: x[:, 1:3],
    "select": lambda x: x[1],
    "view": lambda x: x.view(6, 4),
    "reshape": lambda x: x.reshape(2, 12),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "transpose": lambda x: x.transpose(0, 2),
    "permute": lambda x: x.permute(2, 0, 1),
    "detach": lambda x: x.detach(),
    "float64": lambda x: x.double(),
    "same device": lambda x: x.to(torch.device("cpu"), torch.float16),
    "several": lambda x: x[:, -2:].transpose(1, 2).to(torch.bfloat16)[..., 0],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_and_casts_wait_for_nothing_and_are_right(name: str) -> None:
    tensor, late = promised()
    view = VIEWS[name](tensor)
    assert isinstance(view, Deferred)
    assert late.num_waits == 0

    expected = VIEWS[name](VALUE)
    assert (view.shape, view.stride(), view.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert torch.equal(view + 0, expected)
    assert late.num_waits == 1


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "add": lambda x: (x + 1).tolist(),
    "item": lambda x: x[0, 0, 1].item(),
    "numpy": lambda x: x.numpy().tolist(),
    "tolist": lambda x: x.tolist(),
    "float": lambda x: float(x[1, 2, 3]),
    "bool": lambda x: bool((x > 3).any()),
    "cat": lambda x: torch.cat([x, x]).tolist(),
    "chunk": lambda x: [part.tolist() for part in x.chunk(2)],
    "iteration": lambda x: [part.sum().item() for part in x],
    "deepcopy": lambda x: copy.deepcopy(x).tolist(),
    "repr": repr,
    "equal": lambda x: torch.equal(x, VALUE),
    "norm": lambda x: x.norm().item(),
    "in place": lambda x: x.mul_(2).tolist(),
    "out": lambda x: torch.mul(torch.ones_like(VALUE), 3, out=torch.empty_like(x)).tolist(),
    "contiguous": lambda x: x.transpose(0, 1).contiguous().flatten().tolist(),
}


@pytest.mark.parametrize("name", READS)
def test_every_read_gives_the_value(name: str) -> None:
    tensor, late = promised()
    assert READS[name](tensor) == READS[name](VALUE.clone())
    assert late.num_waits <= 1


def test_views_share_memory_with_what_they_are_views_of() -> None:
    tensor, _ = promised()
    view = tensor[:, 0]
    tensor.add_(100)
    assert torch.equal(view + 0, VALUE[:, 0] + 100)
    view.zero_()
    assert float((tensor + 0)[:, 0].abs().sum()) == 0


def test_cast_is_made_before_somebody_writes_to_its_source() -> None:
    tensor, _ = promised()
    cast = tensor.double()
    tensor.add_(100)
    assert torch.equal(cast + 0, VALUE.double())


def test_view_of_a_cast_is_one_of_the_cast_not_of_its_source() -> None:
    tensor, _ = promised()
    view = tensor.double()[0]
    tensor.add_(100)
    assert torch.equal(view + 0, VALUE.double()[0])


def test_view_of_a_cast_shares_memory_with_it() -> None:
    tensor, _ = promised()
    cast = tensor.double()
    view = cast[0]
    cast.add_(100)
    assert torch.equal(view + 0, VALUE.double()[0] + 100)


def test_result_with_other_strides_gets_those_that_were_promised() -> None:
    tensor, _ = promised(VALUE.transpose(0, 1).contiguous().transpose(0, 1), outline_from=VALUE)
    flat = tensor.view(24)
    assert torch.equal(flat + 0, VALUE.view(24))


def test_result_of_another_shape_is_an_error() -> None:
    tensor, _ = promised(torch.zeros(2, 3), outline_from=VALUE)
    with pytest.raises(RuntimeError, match="was promised"):
        tensor + 1


def test_error_of_a_call_is_raised_where_its_result_is_touched() -> None:
    def fails() -> Any:
        raise KeyError("x")

    tensor = Promise(outline_of(VALUE), fails).tree()
    view = tensor[0]
    with pytest.raises(KeyError):
        view + 1


def test_results_without_promises_stay_the_very_same_tree() -> None:
    tree = ([VALUE], {"x": 1})
    assert forced(tree) is tree
    assert outline_of((VALUE, object())) is None


class Denoiser(Doubling, ModelMixin):  # type: ignore[misc]
    """Twice its input."""


class Guided(DiffusionPipeline):  # type: ignore[misc]
    """Calls its denoiser twice in a step, one call after the other."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, num_inference_steps: int = 4, manner: str = "usual") -> Sum:
        with self.progress_bar(total=num_inference_steps) as bar:
            for _ in range(num_inference_steps):
                given = x.clone()
                first = self.transformer(given)
                if manner == "looks":
                    assert bool(first.isfinite().all())
                if manner == "writes":
                    given += 1
                halved = x / 2
                second = self.transformer(halved)
                if manner == "writes before a third":
                    halved += 1
                    second = second - self.transformer(halved)
                x = second + 1.5 * (first - second)
                bar.update()
        return Sum(images=first if manner == "returns a result" else x)


def guided(manner: str = "usual") -> tuple[Task, torch.Tensor]:
    """A task of the pipeline, run to its first call, and the right result."""
    pipeline = Guided(Denoiser())
    pipeline.set_progress_bar_config(disable=True)
    x = torch.ones(1, 2)
    task = Task("request", lambda task: bind(pipeline, task, defers=True)(x.clone(), manner=manner))
    task.advance()
    return task, pipeline(x.clone(), manner=manner).images


def numbers_of_waiting_calls(task: Task) -> list[int]:
    """How many calls waited at each stop; all of them are run before the task goes on."""
    numbers = []
    while (calls := task.calls) or task.end is None:
        numbers.append(len(calls))
        for call in calls:
            task.answer(call, single(call))
        task.advance()
    return numbers


def test_both_calls_of_a_step_wait_together_once_the_first_step_is_known() -> None:
    task, expected = guided()
    assert numbers_of_waiting_calls(task) == [1, 1, 2, 2, 2]
    assert isinstance(task.end, Value)
    assert torch.equal(task.end.value.images, expected)


def test_calls_that_wait_together_may_run_one_by_one() -> None:
    task, expected = guided()
    for _ in calls_until_end(task):
        pass
    assert isinstance(task.end, Value)
    assert torch.equal(task.end.value.images, expected)


def test_pipeline_that_looks_between_its_calls_waits_for_each() -> None:
    task, expected = guided("looks")
    assert numbers_of_waiting_calls(task) == [1] * 8
    assert isinstance(task.end, Value)
    assert torch.equal(task.end.value.images, expected)


@pytest.mark.parametrize(("manner", "num_calls"), [("writes", 2), ("writes before a third", 3)])
def test_pipeline_that_writes_to_what_it_gave_is_found_out_in_the_first_step(manner: str, num_calls: int) -> None:
    task, expected = guided(manner)
    assert numbers_of_waiting_calls(task) == [1] * 4 * num_calls
    assert isinstance(task.end, Value)
    assert torch.equal(task.end.value.images, expected)


def test_promise_that_a_pipeline_returns_is_kept_when_it_ends() -> None:
    task, expected = guided("returns a result")
    numbers_of_waiting_calls(task)
    assert isinstance(task.end, Value)
    assert torch.equal(task.end.value.images + 0, expected)


def test_error_of_one_of_two_waiting_calls_ends_the_task() -> None:
    task, _ = guided()
    while len(task.calls) < 2:
        task.advance(single(task.calls[0]))
    first, second = task.calls
    task.answer(second, Raised(ValueError("the second")))
    task.answer(first, single(first))
    task.advance()
    assert isinstance(task.end, Raised)
    assert str(task.end.error) == "the second"


def test_cancelled_with_two_waiting_calls() -> None:
    task, _ = guided()
    while len(task.calls) < 2:
        task.advance(single(task.calls[0]))
    task.cancel()
    assert isinstance(task.end, Raised)
    assert task.calls == []


# Each calls its denoiser twice in a step.
SEQUENTIAL: dict[str, dict[str, Any]] = {
    "wan": {},
    "wan_i2v": {},
    "qwen_image": {"negative_prompt": "a dog on the hill lake"},
    "flux": {"negative_prompt": "a dog on the hill", "true_cfg_scale": 2.0},
}


def one_by_one(name: str) -> tuple[list[Call], torch.Tensor, torch.Tensor]:
    """The calls of a request whose results are promises, run one by one; its picture, and the plain one."""
    pipeline, kwargs = build(name)
    kwargs |= SEQUENTIAL[name]
    plain = picture(pipeline(**request(name, 1, kwargs)))
    task = Task("request", lambda task: bind(pipeline, task, defers=True)(**request(name, 1, kwargs)))
    task.advance()
    calls = list(calls_until_end(task))
    assert isinstance(task.end, Value), task.end
    return calls, picture(task.end.value), plain


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_promised_results_give_bit_identical_pictures(name: str) -> None:
    calls, shown, plain = one_by_one(name)
    assert torch.equal(shown, plain)
    assert sum(call.kind == "denoise" for call in calls) == 8


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_two_calls_of_a_lone_request_share_a_forward(name: str) -> None:
    pipeline, kwargs = build(name)
    kwargs |= SEQUENTIAL[name]
    plain = picture(pipeline(**request(name, 2, kwargs)))
    report = run_together(pipeline, [request(name, 2, kwargs)])
    torch.testing.assert_close(picture(report.outputs[0]), plain, rtol=0, atol=1e-5)
    # Five steps: the first is looked at, the second proves.
    assert (report.merged_calls, report.largest_batch, report.mode) == (6, 2, "merge")
