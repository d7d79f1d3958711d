from collections import namedtuple
from enum import Enum
from typing import Any

import pytest
import torch
from diffusers.utils import BaseOutput
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from sgld.worker.trees import Opened, at, clone, closed, is_sequence, leaves, opened, rebuilt, values

Pair = namedtuple("Pair", "left right")
TREE = ((1, [2, {"a": 3}]), {"b": None, "c": (4,)})


class Output(BaseOutput):  # type: ignore[misc]
    sample: torch.Tensor


def test_leaves_come_in_order_with_their_paths() -> None:
    assert list(leaves(TREE)) == [
        ((0, 0), 1),
        ((0, 1, 0), 2),
        ((0, 1, 1, "a"), 3),
        ((1, "b"), None),
        ((1, "c", 0), 4),
    ]


@pytest.mark.parametrize("tree", [TREE, Pair([1], {"a": torch.Size([2])}), Opened(Enum, {"a": (1, {"b": 2})}), 3, ()])
def test_values_are_those_of_the_leaves(tree: Any) -> None:
    assert values(tree) == [leaf for _, leaf in leaves(tree)]


def test_a_node_to_stop_at_is_a_leaf() -> None:
    assert list(leaves(TREE, stop={(0, 1), (1, "c")})) == [
        ((0, 0), 1),
        ((0, 1), [2, {"a": 3}]),
        ((1, "b"), None),
        ((1, "c"), (4,)),
    ]


@pytest.mark.parametrize("leaf", [torch.ones(2), "text", 1, None, torch.Size([1, 2]), b"x", range(3)])
def test_everything_but_dicts_lists_and_tuples_is_a_leaf(leaf: Any) -> None:
    assert [value is leaf for _, value in leaves(leaf)] == [True]
    assert not is_sequence(leaf)


def test_empty_nodes_have_no_leaves() -> None:
    assert list(leaves(([], {}, ()))) == []


@pytest.mark.parametrize(
    "tree",
    [TREE, Pair(1, [2]), Output(sample=torch.ones(1)), BaseModelOutput(last_hidden_state=torch.ones(1)), [], {}, 7],
)
def test_a_rebuilt_tree_has_the_shape_and_the_types_of_the_old_one(tree: Any) -> None:
    new = rebuilt(tree, lambda _path, value: value)
    assert type(new) is type(tree)
    assert list(leaves(new)) == list(leaves(tree))


def test_containers_of_a_rebuilt_tree_are_new() -> None:
    tree = {"a": [1], "b": {"c": 2}}
    new = rebuilt(tree, lambda _path, value: value)
    assert new == tree
    assert new is not tree
    assert new["a"] is not tree["a"]
    assert new["b"] is not tree["b"]


def test_what_is_replaced_is_not_entered() -> None:
    seen: list[Any] = []

    def replace(path: Any, value: Any) -> Any:
        seen.append(path)
        return "new" if path == (0, 1) else value

    assert rebuilt(TREE, replace) == ((1, "new"), {"b": None, "c": (4,)})
    assert (0, 1, 0) not in seen


def test_attributes_of_an_output_follow_what_was_replaced() -> None:
    new = rebuilt(Output(sample=torch.ones(1)), lambda _p, value: 2 * value if torch.is_tensor(value) else value)
    assert new.sample.tolist() == new["sample"].tolist() == new[0].tolist() == [2.0]


def test_at_finds_nodes_and_leaves() -> None:
    assert at(TREE, ()) is TREE
    assert at(TREE, (0, 1, 1, "a")) == 3
    assert at(TREE, (1, "c")) == (4,)


@pytest.mark.parametrize("path", [(2,), (0, 0, 0), (1, "x"), (0, 1, 1, "a", 0)])
def test_at_raises_lookup_error_where_nothing_is(path: Any) -> None:
    with pytest.raises(LookupError):
        at(TREE, path)


class Colour(Enum):
    RED = 1


class Thing:
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def test_objects_are_opened_and_closed_again() -> None:
    x = torch.ones(2)
    inner = Thing(n=2, x=x)
    tree = {"a": [Thing(inner=inner, kind=Thing, none=None)], "b": torch.zeros(1)}
    node = opened(tree)
    assert [path for path, _ in leaves(node)] == [
        ("a", 0, "inner", "n"),
        ("a", 0, "inner", "x"),
        ("a", 0, "kind"),
        ("a", 0, "none"),
        ("b",),
    ]
    assert at(node, ("a", 0, "inner", "n")) == 2
    doubled = closed(rebuilt(node, lambda _path, value: value * 2 if isinstance(value, int | torch.Tensor) else value))
    outer = doubled["a"][0]
    assert (type(outer), type(outer.inner), outer.inner.n, outer.kind) == (Thing, Thing, 4, Thing)
    assert outer.inner.x.tolist() == [2.0, 2.0]
    assert (vars(inner)["n"], x.tolist()) == (2, [1.0, 1.0])


def test_object_that_holds_itself_is_a_leaf_inside() -> None:
    thing = Thing(n=1)
    thing.me = thing  # type: ignore[attr-defined]
    node = opened([thing])
    assert [path for path, _ in leaves(node)] == [(0, "n"), (0, "me")]
    assert at(node, (0, "me")) is thing


@pytest.mark.parametrize("leaf", [nn.Identity(), len, Thing, Colour.RED, torch.Size([2]), 1.5, torch.ones(1)])
def test_what_has_no_attributes_of_its_own_is_not_opened(leaf: Any) -> None:
    assert opened((leaf,))[0] is leaf


def test_clone_shares_no_tensor() -> None:
    tree = {"x": [torch.zeros(2)], "n": 1}
    copied = clone(tree)
    copied["x"][0] += 1
    assert (tree["x"][0].tolist(), copied["n"]) == ([0.0, 0.0], 1)  # type: ignore[index]
