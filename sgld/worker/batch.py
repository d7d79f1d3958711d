"""Merging calls into one forward, and splitting its result: pure functions of the calls and their axes."""

import hashlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from sgld.worker.axes import Batched, CallAxes, Unmergeable, is_constant, num_rows, size
from sgld.worker.calls import Call
from sgld.worker.trees import Path, at, leaves, rebuilt

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Digests:
    """Digests of values, kept for each tensor as long as it lives and isn't written to."""

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()

    def of(self, value: Any) -> str:
        """Equal for equal values; what can't be compared is equal to itself only."""
        return "|".join(f"{path}={self._of_leaf(leaf)}" for path, leaf in leaves(value))

    def _of_leaf(self, leaf: Any) -> str:
        if not isinstance(leaf, torch.Tensor):
            return repr(leaf) if is_constant(leaf) else f"object {id(leaf)}"
        if leaf.is_inference():  # it doesn't count what is written to it
            return _digest(leaf)
        version = leaf._version
        known = self._known.get(leaf)
        if known is None or known[0] != version:
            known = self._known[leaf] = (version, _digest(leaf))
        return str(known[1])


def _digest(tensor: torch.Tensor) -> str:
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    # As integers of the same size, since numpy has no bfloat16.
    data = real.detach().view(_INTEGERS[real.element_size()]).cpu().numpy().tobytes()
    return f"{tensor.dtype}{tuple(tensor.shape)}{hashlib.sha1(data, usedforsecurity=False).hexdigest()}"


def merge_key(call: Call, axes: CallAxes, by_value: Collection[Path], digests: Digests) -> str:
    """What must be equal for two calls to share a forward.

    :param by_value: batched arguments that a model was seen to read from one row only.
    :raises Unmergeable: the arguments don't fit the axes.
    """
    rows, unit = num_rows(call.tree, axes), axes.arguments[axes.reference].size
    parts: list[Any] = [call.component, call.method, call.context]
    for path, leaf in leaves(call.tree, axes.arguments):
        batched = axes.arguments.get(path)
        is_shared = batched is None and not _is_scalar(leaf)
        if batched is not None:
            if size(leaf, batched) * unit != rows * batched.size:
                raise Unmergeable(f"{path} has {size(leaf, batched)} rows, {axes.reference} has {rows}")
            parts.append((path, _outline(leaf, batched)))
        elif not is_shared:
            parts.append((path, leaf.dtype, leaf.ndim))
        if is_shared or path in by_value:
            parts.append((path, digests.of(leaf)))
    return hashlib.sha1(repr(parts).encode(), usedforsecurity=False).hexdigest()[:16]


def _outline(value: Any, batched: Batched) -> Any:
    """The part of a batched argument that all rows of a forward must have in common."""
    if batched.axis is None:
        return [(path, _outline_leaf(leaf)) for path, leaf in leaves(value)]
    shape = list(value.shape)
    del shape[batched.axis]
    return value.dtype, value.device, shape


def _outline_leaf(leaf: Any) -> Any:
    return (leaf.dtype, leaf.device, tuple(leaf.shape)) if isinstance(leaf, torch.Tensor) else type(leaf).__name__


def _is_scalar(value: Any) -> bool:
    """A tensor of one element that isn't batched, as a timestep often is: it may differ between merged calls."""
    return isinstance(value, torch.Tensor) and value.numel() == 1 and value.ndim <= 1


def differing(calls: Sequence[Call], axes: CallAxes, digests: Digests, skip: Collection[Path] = ()) -> set[Path]:
    """The batched and scalar arguments whose values differ between the calls, apart from those in `skip`."""
    found = set()
    for path, leaf in leaves(calls[0].tree, axes.arguments):
        if path not in skip and (path in axes.arguments or _is_scalar(leaf)):
            first = digests.of(leaf)
            if any(digests.of(at(call.tree, path)) != first for call in calls[1:]):
                found.add(path)
    return found


def merged_tree(calls: Sequence[Call], axes: CallAxes, expanded: Collection[Path]) -> Any:
    """The arguments of one forward of all calls.

    :param expanded: scalars that differ: each becomes a tensor with one element per row.
    """
    rows = [num_rows(call.tree, axes) for call in calls]

    def merge(path: Path, value: Any) -> Any:
        batched = axes.arguments.get(path)
        if batched is None and path not in expanded:
            return value
        values = [at(call.tree, path) for call in calls]
        if batched is None:
            return torch.cat([v.reshape(1).expand(n) for v, n in zip(values, rows, strict=True)])
        if batched.axis is None:
            return type(value)(item for v in values for item in v)
        return torch.cat(values, dim=batched.axis)

    return rebuilt(calls[0].tree, merge)


def split(result: Any, calls: Sequence[Call], axes: CallAxes) -> list[Any]:
    """The results of the calls, each with storage of its own.

    :raises Unmergeable: the result holds an object that can't be split.
    """
    assert axes.results is not None
    for path, leaf in leaves(result, axes.results):
        if path not in axes.results and not is_constant(leaf) and not isinstance(leaf, torch.Tensor):
            raise Unmergeable(f"result {path} is a {type(leaf).__name__}, which can't be split")
    results, start, unit = [], 0, axes.arguments[axes.reference].size
    for call in calls:
        stop = start + num_rows(call.tree, axes)
        results.append(_rows_of(result, axes.results, start, stop, unit))
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


def clone(tree: Any) -> Any:
    """The tree with tensors of its own."""
    return rebuilt(tree, lambda _path, value: value.clone() if isinstance(value, torch.Tensor) else value)


def relative_error(result: Any, expected: Any) -> float:
    """Largest ‖result - expected‖ / ‖expected‖ over the tensors; NaN if one is not a number."""
    errors = [0.0]
    for (_, value), (_, reference) in zip(leaves(result), leaves(expected), strict=True):
        if isinstance(value, torch.Tensor):
            if value.shape != reference.shape:
                return float("inf")
            wide = torch.complex128 if reference.is_complex() else torch.float64
            norm = reference.to(wide).norm()
            errors.append(float((value.to(wide) - reference.to(wide)).norm() / norm.clamp_min(1e-30)))
    return max(errors, key=lambda error: (error != error, error))
