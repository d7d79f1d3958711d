from typing import Any

import pytest
import torch
from diffusers.utils import BaseOutput

from sgld.worker.axes import Batched, CallAxes, Unmergeable
from sgld.worker.batch import Digests, clone, differing, merge_key, merged_tree, relative_error, split
from sgld.worker.calls import Call
from worker.requests import Doubling, call_of

ROWS = CallAxes({(0, 0): Batched(0, 1)}, {(): Batched(0, 1)})


def key(call: Call, axes: CallAxes = ROWS, by_value: Any = ()) -> str:
    return merge_key(call, axes, by_value, Digests())


def call(*args: Any, **kwargs: Any) -> Call:
    return call_of(Doubling(), *args, **kwargs)


X = torch.ones(1, 4)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (call(X, torch.tensor(0.1)), call(X, torch.tensor(0.7))),  # timesteps
        (call(X, torch.tensor([3])), call(X, torch.tensor([5]))),
        (call(X), call(2 * X)),
        (call(X), call(torch.ones(3, 4))),  # the number of rows
        (call(X, ids=torch.arange(6)), call(X, ids=torch.arange(6))),  # equal values of other tensors
        (call(X, n=[1, "a", None]), call(X, n=[1, "a", None])),
    ],
)
def test_such_calls_may_share_a_forward(one: Call, other: Call) -> None:
    assert key(one) == key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (call(X), call(torch.ones(1, 5))),
        (call(X), call(X.double())),
        (call(X), call_of(Doubling(), X, component="transformer_2")),
        (call(X), call_of(Doubling(), X, method="encode")),
        (call(X, ids=torch.arange(6)), call(X, ids=torch.arange(6) + 1)),
        (call(X, ids=torch.arange(6)), call(X, ids=torch.arange(6).reshape(2, 3))),
        (call(X, ids=torch.arange(6)), call(X, ids=torch.arange(6).float())),
        (call(X, torch.tensor(1.0)), call(X, torch.tensor(1))),
        (call(X, torch.tensor(1.0)), call(X, torch.tensor([1.0]))),
        (call(X, scale=0.5), call(X, scale=0.6)),
        (call(X, scale=None), call(X, scale=torch.ones(2))),
        (call(X, a=1), call(X, b=1)),
        (call(X, o=object()), call(X, o=object())),
        (call(X, n=[1, 2]), call(X, n=[1, 2, 3])),
        (call(X, n=1), call(X, n="1")),
        (call(X, n=True), call(X, n=1)),
    ],
)
def test_such_calls_never_share_a_forward(one: Call, other: Call) -> None:
    assert key(one) != key(other)


def test_context_is_part_of_the_key() -> None:
    one, other = call(X), call(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert key(one) == key(other)
        third = call(X)
    assert key(third) != key(one)


def test_batched_argument_that_is_read_from_one_row_is_compared_by_value() -> None:
    axes = CallAxes({(0, 0): Batched(0, 1), (1, "ids"): Batched(0, 1)}, {})
    one, other = (call(X, ids=torch.full((1, 3), value)) for value in (1, 2))
    assert key(one, axes) == key(other, axes)
    assert key(one, axes, {(1, "ids")}) != key(other, axes, {(1, "ids")})


def test_lists_of_rows_share_a_forward_where_their_shapes_are_equal() -> None:
    axes = CallAxes({(0, 0): Batched(None, 1)}, {})
    assert key(call([torch.ones(2)]), axes) == key(call([torch.zeros(2)]), axes)
    assert key(call([torch.ones(2)]), axes) != key(call([torch.ones(3)]), axes)


def test_arguments_that_count_other_rows_than_the_reference_do_not_fit() -> None:
    axes = CallAxes({(0, 0): Batched(0, 1), (1, "e"): Batched(0, 2)}, {})
    key(call(torch.ones(2, 4), e=torch.ones(4, 1)), axes)
    with pytest.raises(Unmergeable, match="has 3 rows"):
        key(call(torch.ones(2, 4), e=torch.ones(3, 1)), axes)


class TestDigests:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64])
    def test_every_dtype_has_one(self, dtype: torch.dtype) -> None:
        one, other = torch.tensor([0, 1, 1]).to(dtype), torch.tensor([0, 1, 0]).to(dtype)
        digests = Digests()
        assert digests.of(one) == digests.of(one.clone()) != digests.of(other)

    def test_complex_values_have_one(self) -> None:
        freqs = torch.polar(torch.ones(3), torch.arange(3.0))
        digests = Digests()
        assert digests.of(freqs) == digests.of(freqs.clone()) != digests.of(freqs.conj())

    def test_strides_do_not_matter(self) -> None:
        x = torch.arange(6.0).reshape(2, 3)
        assert Digests().of(x.T) == Digests().of(x.T.contiguous())

    @pytest.mark.parametrize("empty", [torch.ones(0), torch.ones(2, 0)])
    def test_empty_tensors_have_one(self, empty: torch.Tensor) -> None:
        assert Digests().of(empty) == Digests().of(empty.clone())

    def test_tensor_that_was_written_to_has_another(self) -> None:
        digests, x = Digests(), torch.zeros(3)
        before = digests.of(x)
        x[1] = 1
        assert digests.of(x) != before

    def test_tensor_of_inference_mode_that_was_written_to_has_another(self) -> None:
        with torch.inference_mode():
            digests, x = Digests(), torch.zeros(3)
            before = digests.of(x)
            x[1] = 1
            assert digests.of(x) != before

    def test_objects_are_equal_to_themselves_only(self) -> None:
        digests, one, other = Digests(), object(), object()
        assert digests.of(one) == digests.of(one) != digests.of(other)


def test_batch_axis_1_is_concatenated_and_split_again() -> None:
    axes = CallAxes({(0, 0): Batched(1, 1)}, {(0,): Batched(1, 1)})
    calls = [call(torch.full((3, rows, 2), float(rows))) for rows in (1, 2)]
    args, _ = merged_tree(calls, axes, ())
    assert args[0].shape == (3, 3, 2)
    one, two = split((args[0],), calls, axes)
    assert torch.equal(one[0], calls[0].args[0])
    assert torch.equal(two[0], calls[1].args[0])


def test_lists_of_rows_are_joined_and_split_again() -> None:
    axes = CallAxes({(0, 0): Batched(None, 1)}, {(): Batched(None, 1)})
    calls = [call([torch.full((2,), 1.0)]), call([torch.full((3,), 2.0)])]
    args, _ = merged_tree(calls, axes, ())
    assert [row.tolist() for row in args[0]] == [[1.0, 1.0], [2.0, 2.0, 2.0]]
    one, two = split(args[0], calls, axes)
    assert (one[0].tolist(), two[0].tolist()) == ([1.0, 1.0], [2.0, 2.0, 2.0])
    assert one[0].untyped_storage().data_ptr() != args[0][0].untyped_storage().data_ptr()


def test_scalars_that_differ_become_one_element_per_row() -> None:
    calls = [call(torch.ones(2, 4), torch.tensor(0.1)), call(torch.ones(1, 4), torch.tensor(0.7))]
    assert (0, 1) in differing(calls, ROWS, Digests())
    args, _ = merged_tree(calls, ROWS, {(0, 1)})
    assert args[1].tolist() == pytest.approx([0.1, 0.1, 0.7])


def test_scalars_that_are_equal_stay_as_they_are() -> None:
    calls = [call(X, torch.tensor(0.5)), call(2 * X, torch.tensor(0.5))]
    assert differing(calls, ROWS, Digests()) == {(0, 0)}
    args, _ = merged_tree(calls, ROWS, ())
    assert args[1].shape == ()


def test_what_is_known_to_differ_is_not_looked_at() -> None:
    assert differing([call(X), call(2 * X)], ROWS, Digests(), skip={(0, 0)}) == set()


class Output(BaseOutput):  # type: ignore[misc]
    sample: torch.Tensor


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda x: x, ()),
        (lambda x: (x,), (0,)),
        (lambda x: [x, None], (0,)),
        (lambda x: {"a": {"b": x}}, ("a", "b")),
        (lambda x: Output(sample=x), ("sample",)),
    ],
)
def test_results_of_every_form_are_split(wrap: Any, path: Any) -> None:
    axes = CallAxes(ROWS.arguments, {path: Batched(0, 2)})
    calls = [call(torch.ones(1, 1)), call(torch.ones(2, 1))]
    whole = torch.arange(6)
    for result, expected in zip(split(wrap(whole), calls, axes), ([0, 1], [2, 3, 4, 5]), strict=True):
        assert type(result) is type(wrap(whole))
        found = result
        for part in path:
            found = found[part]
        assert found.tolist() == expected


def test_results_have_storage_of_their_own() -> None:
    axes = CallAxes(ROWS.arguments, {("x",): Batched(0, 1)})
    calls = [call(X), call(X)]
    whole = {"x": torch.zeros(2, 4), "shared": torch.zeros(3)}
    one, two = split(whole, calls, axes)
    one["x"] += 1
    one["shared"] += 1
    assert float(two["x"].sum()) == float(two["shared"].sum()) == 0.0
    assert one["x"].untyped_storage().nbytes() == 4 * 4
    assert float(whole["x"].sum()) == 0.0


def test_result_with_an_object_can_not_be_split() -> None:
    with pytest.raises(Unmergeable, match="is a object"):
        split((torch.ones(2), object()), [call(X), call(X)], CallAxes(ROWS.arguments, {(0,): Batched(0, 1)}))


def test_clone_shares_no_tensor() -> None:
    tree = {"x": [torch.zeros(2)], "n": 1}
    copied = clone(tree)
    copied["x"][0] += 1
    assert (tree["x"][0].tolist(), copied["n"]) == ([0.0, 0.0], 1)  # type: ignore[index]


class TestRelativeError:
    def test_is_the_largest_over_the_tensors(self) -> None:
        expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0]), "n": None}
        result = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.3]), "n": None}
        assert relative_error(result, expected) == pytest.approx(0.3)
        assert relative_error(expected, expected) == 0.0

    def test_is_nan_where_something_is_not_a_number(self) -> None:
        bad = [torch.tensor([float("nan")]), torch.ones(1)]
        good = [torch.ones(1), torch.ones(1)]
        for result, expected in ((bad, good), (good, bad), (bad[::-1], good)):
            assert relative_error(result, expected) != relative_error(result, expected)

    def test_is_infinite_for_another_shape(self) -> None:
        assert relative_error(torch.ones(2), torch.ones(3)) == float("inf")

    def test_of_zeros_is_zero_or_huge(self) -> None:
        assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
        assert relative_error(torch.ones(2), torch.zeros(2)) > 1e20

    def test_counts_whole_numbers_and_imaginary_parts(self) -> None:
        assert relative_error(torch.tensor([2]), torch.tensor([1])) == 1.0
        assert relative_error(torch.tensor([1 + 1j]), torch.tensor([1 + 0j])) == pytest.approx(1.0)
