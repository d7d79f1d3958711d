from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils import BaseOutput
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from sgld.worker.axes import Batched, CallAxes, Unmergeable, with_results
from sgld.worker.batch import ADAPTERS, differing, merge_key, merged_tree, split, to_expand
from sgld.worker.calls import Call
from sgld.worker.digests import Digests
from sgld.worker.slots import Applied, Slots
from worker.requests import Doubling, call_of

ROWS = CallAxes({(0, 0): Batched(0, 1)}, {(): Batched(0, 1)})


def key(call: Call, axes: CallAxes = ROWS, pinned: Any = ()) -> str:
    return merge_key(call, axes, pinned, Digests())


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
    assert key(one, axes, {((1, "ids"), "value")}) != key(other, axes, {(1, "ids")})


@pytest.mark.parametrize(
    "state", [object(), torch.Generator(), [object()], {"cache": nn.Identity()}, lambda x: x, torch.nn.functional.relu]
)
def test_call_with_an_object_among_its_arguments_never_shares_a_forward(state: Any) -> None:
    with pytest.raises(Unmergeable, match=r"argument \(1, 'o'.* is a .*, which may have a state"):
        key(call(X, o=state))
    axes = CallAxes({(0, 0): Batched(0, 1), (1, "o"): Batched(None, 1)}, {})
    with pytest.raises(Unmergeable, match="which may have a state"):
        key(call(X, o=[state]), axes)


LIST = CallAxes({(0, 0): Batched(None, 1)}, {})


@pytest.mark.parametrize(
    "other", [[torch.zeros(2, 3)], [torch.ones(5, 7)], [torch.ones(2, 3)] * 3, (torch.ones(2, 3),)]
)
def test_lists_of_rows_share_a_forward_whatever_their_shapes_and_number(other: Any) -> None:
    assert key(call([torch.ones(2, 3)]), LIST) == key(call(other), LIST)


@pytest.mark.parametrize(
    "other", [[torch.ones(2)], [torch.ones(2, 3).double()], [[torch.ones(2, 3)]], [torch.ones(2, 3), torch.ones(1)]]
)
def test_lists_of_other_rows_share_no_forward(other: Any) -> None:
    assert key(call([torch.ones(2, 3)]), LIST) != key(call(other), LIST)


def test_shapes_in_lists_are_in_the_key_once_they_must_be_equal() -> None:
    pinned = {((0, 0), "shapes")}
    one = call([torch.ones(2), torch.ones(3)])
    assert key(one, LIST, pinned) == key(call([torch.zeros(3), torch.zeros(2), torch.ones(3)]), LIST, pinned)
    assert key(one, LIST, pinned) != key(call([torch.ones(2), torch.ones(2)]), LIST, pinned)


def test_different_shapes_in_lists_are_a_difference_of_their_own() -> None:
    one, same, other = (call([torch.full((n,), 1.0)]) for n in (2, 2, 3))
    assert differing([one, same], LIST, Digests()) == set()
    assert differing([one, other], LIST, Digests()) == {((0, 0), "value"), ((0, 0), "shapes")}


GIVEN = CallAxes({(0, 0): Batched(0, 1), (1, "image"): Batched(0, 1)}, {})


def test_an_argument_of_zeros_beside_another_is_a_difference_of_its_own() -> None:
    nothing, one, other = (call(X, image=torch.full((1, 3), v)) for v in (0.0, 1.0, 2.0))
    image = (1, "image")
    assert differing([one, other], GIVEN, Digests()) == {(image, "value")}
    assert differing([one, nothing], GIVEN, Digests()) == {(image, "value"), (image, "zero")}
    assert key(one, GIVEN) == key(nothing, GIVEN)
    assert key(one, GIVEN, {(image, "zero")}) != key(nothing, GIVEN, {(image, "zero")})
    assert key(one, GIVEN, {(image, "zero")}) == key(other, GIVEN, {(image, "zero")})


def test_one_number_for_each_row_may_be_zero() -> None:
    axes = CallAxes({(0, 0): Batched(0, 1), (0, 1): Batched(0, 1)}, {})
    calls = [call(X, torch.tensor([t])) for t in (0.0, 1.0)]
    assert differing(calls, axes, Digests()) == {((0, 1), "value")}


def test_arguments_that_count_other_rows_than_the_reference_do_not_fit() -> None:
    axes = CallAxes({(0, 0): Batched(0, 1), (1, "e"): Batched(0, 2)}, {})
    key(call(torch.ones(2, 4), e=torch.ones(4, 1)), axes)
    with pytest.raises(Unmergeable, match="has 3 rows"):
        key(call(torch.ones(2, 4), e=torch.ones(3, 1)), axes)


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
    assert ((0, 1), "value") in differing(calls, ROWS, Digests())
    args, _ = merged_tree(calls, ROWS, {(0, 1)})
    assert args[1].tolist() == pytest.approx([0.1, 0.1, 0.7])


def test_scalars_that_are_equal_stay_as_they_are() -> None:
    calls = [call(X, torch.tensor(0.5)), call(2 * X, torch.tensor(0.5))]
    assert differing(calls, ROWS, Digests()) == {((0, 0), "value")}
    args, _ = merged_tree(calls, ROWS, ())
    assert args[1].shape == ()


def test_adapters_are_in_the_key_once_they_must_be_equal_and_else_a_difference() -> None:
    slots = Slots(Doubling(), torch.device("cpu"))
    one, other = call(X), call(X)
    one.adapters, other.adapters = Applied(slots, "a"), Applied(slots, "b")
    axes = CallAxes({(0, 0): Batched(0, 1)}, {})
    assert key(one) == key(other)
    keys = [merge_key(each, axes, {ADAPTERS}, Digests()) for each in (one, other, call(X))]
    assert len(set(keys)) == 3
    assert differing([one, other], axes, Digests()) == {ADAPTERS}
    assert differing([one, one], axes, Digests()) == set()


def test_where_adapters_may_differ_all_scalars_become_one_element_per_row() -> None:
    axes = CallAxes({(0, 0): Batched(0, 1)}, {})
    one = call(X, torch.tensor([1.0]), ids=torch.arange(6))
    assert to_expand(one, axes, {((0, 0), "value")}) == set()
    assert to_expand(one, axes, {((0, 0), "value"), ADAPTERS}) == {(0, 1)} | {ADAPTERS[0]}


def test_what_is_known_to_differ_is_not_looked_at() -> None:
    assert differing([call(X), call(2 * X)], ROWS, Digests(), skip={((0, 0), "value")}) == set()


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


def rows_of(result: Any) -> list[Any]:
    """The results of calls of one row and of two, in a forward of three."""
    axes = CallAxes({(0, 0): Batched(0, 1)}, None)
    calls = [call(torch.ones(n, 4)) for n in (1, 2)]
    return split(result, calls, with_results(axes, call(torch.ones(3, 4)).tree, result))


def test_cache_of_keys_and_values_is_split() -> None:
    cache, keys = DynamicCache(), torch.rand(3, 2, 5, 4)
    cache.update(keys, 2 * keys, 0)
    cache.update(3 * keys, 4 * keys, 1)
    result = BaseModelOutputWithPast(torch.rand(3, 5, 8), past_key_values=cache, hidden_states=(keys, keys))
    one, two = rows_of(result)
    assert type(one) is BaseModelOutputWithPast
    assert type(one.past_key_values) is DynamicCache
    assert torch.equal(two.past_key_values.layers[1].values, 4 * keys[1:])
    assert one.past_key_values.get_seq_length() == 5
    # It is a cache of its own.
    one.past_key_values.update(keys[:1], keys[:1], 0)
    assert (one.past_key_values.get_seq_length(), cache.get_seq_length()) == (10, 5)
    assert torch.equal(one.hidden_states[1], keys[:1])


def test_distribution_of_latents_is_split() -> None:
    parameters = torch.rand(3, 8, 2, 2)
    one, two = rows_of(AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(parameters)))
    assert type(two.latent_dist) is DiagonalGaussianDistribution
    alone = DiagonalGaussianDistribution(parameters[1:])
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(two.latent_dist.sample(generators[0]), alone.sample(generators[1]))
    assert torch.equal(one.latent_dist.mode(), parameters[:1, :4])


def test_result_with_an_object_can_not_be_split() -> None:
    with pytest.raises(Unmergeable, match="is a object"):
        split((torch.ones(2), object()), [call(X), call(X)], CallAxes(ROWS.arguments, {(0,): Batched(0, 1)}))
