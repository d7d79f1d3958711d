"""Merging calls into one forward, and splitting its result: pure functions of the calls and their axes."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from sgld.models.quantization import MIXES_ROWS
from sgld.worker.axes import Batched, CallAxes, Unmergeable, is_constant, num_rows, size
from sgld.worker.calls import Call
from sgld.worker.digests import Digests
from sgld.worker.out_of_memory import one_error
from sgld.worker.padding import mask_of, padded
from sgld.worker.trees import Path, at, clone, closed, leaves, opened, rebuilt

Trait = tuple[Path, str]
"""An argument, and what of it may differ between the calls of a forward: see `_traits`."""
ADAPTERS: Trait = (("adapters",), "adapters")
"""No argument, and so at no path of one: which adapters the calls have."""

# Traits that say how much padding a row has in a batch. What is kept of first blocks has none.
_SIZES = ("shapes", "length")


def merge_key(call: Call, axes: CallAxes, pinned: Collection[Trait], digests: Digests) -> str:
    """What must be equal for two calls to share a forward.

    :param pinned: traits in which calls were seen not to be independent of each other.
    :raises Unmergeable: the arguments don't fit the axes, or hold an object that may have a state; or the component
        mixes rows.
    """
    if reason := getattr(call.module, MIXES_ROWS, None):
        raise Unmergeable(reason)
    rows, unit = num_rows(call.tree, axes), axes.arguments[axes.reference].size
    parts: list[Any] = [call.component, call.method, call.context]
    shared = []
    for path, leaf in leaves(call.tree, axes.arguments):
        _check_values(path, leaf)
        batched = axes.arguments.get(path)
        if batched is not None:
            if size(leaf, batched) * unit != rows * batched.size:
                raise Unmergeable(f"{path} has {size(leaf, batched)} rows, {axes.reference} has {rows}")
            parts.append((path, _outline(leaf, batched, axes.lengths.get(path))))
        elif _is_scalar(leaf):
            parts.append((path, leaf.dtype, leaf.device, leaf.ndim))
        else:
            shared.append((path, leaf))
    parts += zip([path for path, _ in shared], digests.of(*(leaf for _, leaf in shared)), strict=True)
    pinned = pinned if call.site is None else {*pinned, *(t for t in _traits(call, axes) if t[1] in _SIZES)}
    parts += [(t, _trait(call, axes, t, digests)) for t in _traits(call, axes) if t in pinned]
    if call.site is not None:
        parts.append("first block")
    return hashlib.sha1(repr(parts).encode(), usedforsecurity=False).hexdigest()[:16]


def _check_values(path: Path, value: Any) -> None:
    for inside, leaf in leaves(value):
        if not isinstance(leaf, torch.Tensor) and not is_constant(leaf):
            raise Unmergeable(f"argument {(*path, *inside)} is a {type(leaf).__name__}, which may have a state")


def _outline(value: Any, batched: Batched, length_axis: int | None) -> Any:
    """The part of a batched argument that all rows of a forward must have in common."""
    if batched.axis is None:
        return sorted({repr([(path, _outline_leaf(leaf)) for path, leaf in leaves(row)]) for row in value})
    shape = [n for axis, n in enumerate(value.shape) if axis not in (batched.axis, length_axis)]
    return value.dtype, value.device, shape


def _outline_leaf(leaf: Any) -> Any:
    return (leaf.dtype, leaf.device, leaf.ndim) if isinstance(leaf, torch.Tensor) else type(leaf).__name__


def _is_scalar(value: Any) -> bool:
    """A tensor of one element that isn't batched, as a timestep often is: it may differ between merged calls."""
    return isinstance(value, torch.Tensor) and value.numel() == 1 and value.ndim <= 1


def _traits(call: Call, axes: CallAxes) -> Iterator[Trait]:
    """In what such calls may differ.

    1. The value of a batched argument or a scalar.
    2. Whether a batched argument is zero everywhere: models ask that of a whole batch, to see if it is given at all.
       Not of the first one, which is what the model works on, nor of one number for each row.
    3. The shapes of the tensors in a list of rows.
    4. The number of tokens of a text.
    5. The adapters of the request.
    """
    yield ADAPTERS
    rows = num_rows(call.tree, axes)
    for path, leaf in leaves(call.tree, axes.arguments):
        batched = axes.arguments.get(path)
        if batched is not None or _is_scalar(leaf):
            yield path, "value"
        if batched is not None and batched.axis is None:
            yield path, "shapes"
        elif batched is not None and path != axes.reference and leaf.numel() > rows:
            yield path, "zero"
        if path in axes.lengths:
            yield path, "length"


def _trait(call: Call, axes: CallAxes, trait: Trait, digests: Digests) -> Any:
    path, what = trait
    if trait == ADAPTERS:
        return call.adapters
    value = at(call.tree, path)
    if what == "length":
        return value.shape[axes.lengths[path]]
    if what == "value":
        return digests.of(value)
    if what == "zero":
        return digests.are_zero(value)
    return sorted(
        {repr([(path, tuple(x.shape)) for path, x in leaves(row) if isinstance(x, torch.Tensor)]) for row in value}
    )


def differing(calls: Sequence[Call], axes: CallAxes, digests: Digests, skip: Collection[Trait] = ()) -> set[Trait]:
    """In what the calls differ, apart from `skip`."""
    traits = [trait for trait in _traits(calls[0], axes) if trait not in skip]
    # Read at once: what isn't known of them yet comes from the device in two transfers.
    digests.of(*(at(call.tree, path) for call in calls for path, what in traits if what == "value"))
    digests.are_zero(*(at(call.tree, path) for call in calls for path, what in traits if what == "zero"))
    values = {trait: [_trait(call, axes, trait, digests) for call in calls] for trait in traits}
    return {trait for trait, (first, *others) in values.items() if any(other != first for other in others)}


def to_expand(call: Call, axes: CallAxes, covered: Collection[Trait]) -> set[Path]:
    """The scalars that get an element for each row in a forward of such calls.

    :param covered: in what calls may differ. Where adapters do it is all scalars: what a layer makes of a timestep must
        have a row for each of the call then.
    """
    paths = {path for path, _ in covered}
    if ADAPTERS in covered:
        paths |= {path for path, leaf in leaves(call.tree, axes.arguments) if _is_scalar(leaf)}
    return paths - axes.arguments.keys()


@one_error()
def merged_tree(calls: Sequence[Call], axes: CallAxes, expanded: Collection[Path]) -> Any:
    """The arguments of one forward of all calls.

    :param expanded: scalars that differ: each becomes a tensor with one element per row.
    """
    rows = [num_rows(call.tree, axes) for call in calls]

    def merge(path: Path, value: Any) -> Any:
        batched = axes.arguments.get(path)
        if value is None and (mask := axes.masks.get(path)) is not None:
            return mask_of([at(call.tree, mask.like) for call in calls], axes.lengths[mask.like], mask.dtype)
        if batched is None and path not in expanded:
            return value
        values = [at(call.tree, path) for call in calls]
        if batched is None:
            return torch.cat([v.reshape(1).expand(n) for v, n in zip(values, rows, strict=True)])
        if batched.axis is None:
            return type(value)(item for v in values for item in v)
        if path in axes.lengths:
            values = padded(values, axes.lengths[path])
        return torch.cat(values, dim=batched.axis)

    return rebuilt(calls[0].tree, merge)


def split(result: Any, calls: Sequence[Call], axes: CallAxes) -> list[Any]:
    """The results of the calls, each with storage of its own.

    :raises Unmergeable: the result holds an object that can't be split.
    """
    assert axes.results is not None
    result = opened(result)
    for path, leaf in leaves(result, axes.results):
        if path not in axes.results and not is_constant(leaf) and not isinstance(leaf, torch.Tensor):
            raise Unmergeable(f"result {path} is a {type(leaf).__name__}, which can't be split")
    results, start, unit = [], 0, axes.arguments[axes.reference].size
    for call in calls:
        stop = start + num_rows(call.tree, axes)
        results.append(closed(_rows_of(result, axes.results, start, stop, unit)))
        start = stop
    return results


def _rows_of(result: Any, batched_results: dict[Path, Batched], start: int, stop: int, unit: int) -> Any:
    def take(path: Path, value: Any) -> Any:
        batched = batched_results.get(path)
        if batched is None:
            return value.clone() if isinstance(value, torch.Tensor) else value
        first, last = start * batched.size // unit, stop * batched.size // unit
        if batched.axis is None:
            return type(value)(clone(item) for item in value[first:last])
        return value.narrow(batched.axis, first, last - first).clone()

    return rebuilt(result, take)
