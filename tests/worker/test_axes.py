from typing import Any

import pytest
import torch

from sgld.worker.axes import (
    Batched,
    CallAxes,
    Unmergeable,
    form,
    hypothesis,
    learned,
    num_rows,
    size,
    skeleton,
    with_results,
)


def t(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("one", "two", "batched"),
    [
        (t(1, 5), t(2, 5), Batched(0, 1)),
        (t(2, 5), t(4, 5), Batched(0, 2)),  # guidance doubles the rows of a sample
        (t(5, 1, 3), t(5, 2, 3), Batched(1, 1)),
        ([t(3)], [t(3), t(3)], Batched(None, 1)),
        ([t(3), t(3)], [t(3)] * 4, Batched(None, 2)),
        ((1,), (1, 1), Batched(None, 1)),
    ],
)
def test_what_doubles_is_batched(one: Any, two: Any, batched: Batched) -> None:
    assert learned({"x": one}, {"x": two}) == {("x",): batched}


@pytest.mark.parametrize(
    ("one", "two"),
    [(t(5, 3), t(5, 3)), (t(), t()), ([1, 2], [1, 2]), (None, None), (0.5, 0.5), ({"a": t(2)}, {"a": t(2)})],
)
def test_what_stays_equal_is_shared(one: Any, two: Any) -> None:
    assert learned([one], [two]) == {}


def test_batched_leaves_are_found_in_nested_arguments() -> None:
    def tree(rows: int) -> Any:
        return (t(rows, 4), t()), {"added": {"ids": t(rows, 6), "pos": t(9, 3)}, "residuals": [t(2 * rows), t(2)]}

    assert learned(tree(1), tree(2)) == {
        (0, 0): Batched(0, 1),
        (1, "added", "ids"): Batched(0, 1),
        (1, "residuals", 0): Batched(0, 2),
    }


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (t(1, 5), t(3, 5)),
        (t(1, 1), t(2, 2)),
        (t(1, 5), t(2, 5, 1)),
        (1, 2),
        ("a", "b"),
        (None, 1.0),
        ([1, 2], [1, 2, 3]),
        ([], [1]),
    ],
)
def test_what_changes_otherwise_can_not_be_merged(one: Any, two: Any) -> None:
    with pytest.raises(Unmergeable):
        learned({"x": one}, {"x": two})


def test_skeleton_has_shapes_and_no_data() -> None:
    bare = skeleton({"x": torch.ones(2, 3, dtype=torch.float16), "n": 1})
    assert (bare["x"].device.type, bare["x"].shape, bare["x"].dtype, bare["n"]) == ("meta", (2, 3), torch.float16, 1)


def test_hypothesis_is_axis_0_of_what_has_as_many_rows_as_the_first_tensor() -> None:
    tree: Any = (t(2, 3),), {"t": t(), "e": t(2, 7), "ids": t(9, 2), "n": 1}
    assert hypothesis(tree) == CallAxes({(0, 0): Batched(0, 2), (1, "e"): Batched(0, 2)}, None)


@pytest.mark.parametrize("tree", [((), {}), ((1, "a"), {"t": t()})])
def test_without_a_tensor_there_is_no_hypothesis(tree: Any) -> None:
    with pytest.raises(Unmergeable, match="no tensor"):
        hypothesis(tree)


def test_results_are_completed_from_what_a_call_returned() -> None:
    axes = CallAxes({(0, 0): Batched(1, 1)}, None)
    tree: Any = (t(5, 3),), {}
    completed = with_results(axes, tree, {"sample": t(3, 4), "pair": (t(6, 1), None), "scalar": t()})
    assert completed.results == {("sample",): Batched(0, 1), ("pair", 0): Batched(0, 2)}
    assert completed.arguments == axes.arguments


@pytest.mark.parametrize("result", [t(4, 3), [t(3), t(2, 2)]])
def test_result_that_does_not_count_the_rows_can_not_be_split(result: Any) -> None:
    with pytest.raises(Unmergeable, match="doesn't count 3 rows"):
        with_results(CallAxes({(0, 0): Batched(0, 1)}, None), ((t(3, 2),), {}), result)


def test_number_of_rows_is_the_size_of_the_reference() -> None:
    axes = CallAxes({(1, "x"): Batched(1, 1), (0, 0): Batched(0, 2)}, {})
    assert axes.reference == (1, "x")
    assert num_rows(((t(6),), {"x": t(5, 3)}), axes) == 3
    with pytest.raises(Unmergeable, match="missing"):
        num_rows(((t(6),), {}), axes)


def test_size_of_what_is_not_as_it_was_learned() -> None:
    assert size([1, 2, 3], Batched(None, 1)) == 3
    for value in (None, t(2), 3):
        with pytest.raises(Unmergeable):
            size(value, Batched(1, 1))


def test_form_tells_which_arguments_are_given_and_what_they_are() -> None:
    assert form(((t(1, 2), 3), {"x": None, "y": [t(1)]})) == "0:T2,1:int,x:NoneType,y:list"
    assert form(((t(1, 2),), {})) == form(((t(4, 9),), {})) != form(((t(1),), {}))
