from collections.abc import Callable
from typing import Any

import pytest
import torch

from sgld.worker.axes import Batched, CallAxes
from sgld.worker.batch import merged_tree
from sgld.worker.calls import Call
from sgld.worker.proof import culprits, problem
from worker.requests import Function, call_of

AXES = CallAxes({(0, 0): Batched(0, 1), (0, 1): Batched(0, 1), (0, 2): Batched(0, 1)}, {(): Batched(0, 1)})
X, A, B = (((0, index), "value") for index in range(3))


def two(function: Callable[..., Any], rows: int = 1) -> tuple[Call, Call]:
    torch.manual_seed(0)
    one, other = (call_of(Function(function), *(torch.rand(n, 4) for _ in range(3))) for n in (1, rows))
    return one, other


def what_is_wrong(function: Callable[..., Any]) -> str | None:
    calls = two(function)
    values = [function(*call.args) for call in calls]
    trees = [merged_tree(together, AXES, ()) for together in (calls, [calls[0]] * 2)]
    return problem(calls, AXES, values, *trees)


def test_rows_that_are_independent_are_right() -> None:
    assert what_is_wrong(lambda x, a, b: x * a + b) is None


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, a, b: x * a + b.mean(0), "differ by"),
        (lambda x, a, b: x * a + b * len(x), "differ by"),  # a batch of one row repeated is as wrong
        (lambda x, a, b: x / (len(x) - 2), "differ by inf"),
        (lambda x, a, b: x[:1], "raised RuntimeError"),
    ],
)
def test_what_is_wrong_is_said(function: Callable[..., Any], reason: str) -> None:
    found = what_is_wrong(function)
    assert found is not None
    assert reason in found


def test_a_batch_may_be_as_inexact_as_one_row_repeated() -> None:
    rough = 1 + 1e-5
    assert what_is_wrong(lambda x, a, b: x * (rough if len(x) > 1 else 1.0)) is None
    assert what_is_wrong(lambda x, a, b: x * torch.tensor([[1.0], [rough]])[: len(x)]) is not None


@pytest.mark.parametrize(
    ("function", "guilty"),
    [
        (lambda x, a, b: x + a[0] + b, {A}),
        (lambda x, a, b: x + a[0] + b[0], {A, B}),
        (lambda x, a, b: x + a + b, set()),
        (lambda x, a, b: x[0] + a + b, set()),  # what the model works on always differs
    ],
)
def test_arguments_that_make_a_forward_wrong_are_found(function: Callable[..., Any], guilty: set[Any]) -> None:
    assert culprits(*two(function), AXES, {X, A, B}) == guilty


def test_search_for_the_guilty_shows_life_after_each_forward() -> None:
    num_forwards = num_pulses = 0

    def function(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        nonlocal num_forwards
        num_forwards += 1
        return x + a[0] + b

    def pulse() -> None:
        nonlocal num_pulses
        num_pulses += 1
        assert num_pulses == num_forwards

    culprits(*two(function), AXES, {A, B}, pulse)
    assert num_pulses == 8


def test_nobody_is_to_blame_where_arguments_do_not_fit_each_other() -> None:
    assert culprits(*two(lambda x, a, b: x + a[0], rows=2), AXES, {X, A}) == set()


def test_mixture_that_a_model_refuses_blames_nobody() -> None:
    def picky(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such mixture")

    assert culprits(*two(picky), AXES, {A, B}) == set()
