"""Which axis of each argument and result of a call counts the samples: learned, not listed.

The pipeline runs with one sample and with two; what doubled is batched, what stayed equal is shared. Where a pipeline
can't be asked so, axis 0 is a hypothesis that only a proof accepts.
"""

from dataclasses import dataclass, field, replace
from enum import Enum
from numbers import Number
from typing import Any

import torch

from sgld.worker.trees import Opened, Path, is_sequence, leaves, opened, rebuilt


class Unmergeable(Exception):
    """These calls can't be described by batch axes; the message says why."""


@dataclass(frozen=True)
class Batched:
    """A tensor whose `axis` counts samples, or a list of samples (axis None); `size` at one sample."""

    axis: int | None
    size: int


@dataclass(frozen=True)
class Mask:
    """An argument that is None where all tokens of the argument `like` count: else (rows, tokens), zero for padding."""

    like: Path
    dtype: torch.dtype


@dataclass(frozen=True)
class CallAxes:
    """The batched leaves of a call; a leaf that isn't named is shared by all samples.

    `results` is None while no result was seen. `lengths`: the axis of batched arguments that counts tokens of text,
    and can be padded. `masks`: what says then where the padding is.
    """

    arguments: dict[Path, Batched]
    results: dict[Path, Batched] | None
    lengths: dict[Path, int] = field(default_factory=dict)
    masks: dict[Path, Mask] = field(default_factory=dict)

    @property
    def reference(self) -> Path:
        """The argument whose size tells the number of rows of a call."""
        return next(iter(self.arguments))


def form(tree: Any) -> str:
    """The outline of a call's arguments: which are given, and what they are. Axes are learned for each form."""
    args, kwargs = tree
    named = [*enumerate(args), *kwargs.items()]
    return ",".join(f"{name}:{_outline(value)}" for name, value in named)


def _outline(value: Any) -> str:
    return f"T{value.ndim}" if isinstance(value, torch.Tensor) else type(value).__name__


def skeleton(tree: Any) -> Any:
    """The tree with tensors that have shapes and no data."""

    def bare(_path: Path, value: Any) -> Any:
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    return rebuilt(tree, bare)


def learned(one: Any, two: Any) -> dict[Path, Batched]:
    """What doubled between the trees of one sample and of two.

    :raises Unmergeable: something else than a size doubled.
    """
    found: dict[Path, Batched] = {}
    _compare(one, two, (), found)
    return found


def _compare(one: Any, two: Any, path: Path, found: dict[Path, Batched]) -> None:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one.shape != two.shape:
            found[path] = _doubled_axis(one.shape, two.shape, path)
    elif isinstance(one, Opened) and isinstance(two, Opened):
        _compare(one.attributes, two.attributes, path, found)
    elif isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        for key in one:
            _compare(one[key], two[key], (*path, key), found)
    elif is_sequence(one) and is_sequence(two):
        if one and len(two) == 2 * len(one):
            found[path] = Batched(None, len(one))
        elif len(two) == len(one):
            for index in range(len(one)):
                _compare(one[index], two[index], (*path, index), found)
        else:
            raise Unmergeable(f"{path} has {len(one)} items for one sample and {len(two)} for two")
    elif is_constant(one) and one != two:
        raise Unmergeable(f"{path} is {one!r} for one sample and {two!r} for two")


def _doubled_axis(one: torch.Size, two: torch.Size, path: Path) -> Batched:
    axes = [axis for axis, sizes in enumerate(zip(one, two, strict=False)) if sizes[0] != sizes[1]]
    if len(one) == len(two) and len(axes) == 1 and two[axes[0]] == 2 * one[axes[0]]:
        return Batched(axes[0], one[axes[0]])
    raise Unmergeable(f"{path} is {tuple(one)} for one sample and {tuple(two)} for two")


def hypothesis(tree: Any) -> CallAxes:
    """Axis 0 of every tensor that has as many rows there as the first.

    :raises Unmergeable: there is no tensor with an axis.
    """
    tensors = [(path, leaf) for path, leaf in leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.ndim]
    if not tensors:
        raise Unmergeable("no tensor among the arguments")
    rows = tensors[0][1].shape[0]
    return CallAxes({path: Batched(0, rows) for path, leaf in tensors if leaf.shape[0] == rows}, None)


def with_results(axes: CallAxes, tree: Any, result: Any) -> CallAxes:
    """The axes completed by a call's result: axis 0 of each tensor; one without an axis is shared.

    :raises Unmergeable: the result holds an object that can't be split.
    """
    rows = num_rows(tree, axes)
    unit = axes.arguments[axes.reference].size
    found = {}
    for path, leaf in leaves(opened(result)):
        if isinstance(leaf, torch.Tensor) and leaf.ndim:
            if leaf.shape[0] * unit % rows:
                raise Unmergeable(f"result {path} of shape {tuple(leaf.shape)} doesn't count {rows} rows")
            found[path] = Batched(0, leaf.shape[0] * unit // rows)
    return replace(axes, results=found)


def num_rows(tree: Any, axes: CallAxes) -> int:
    """The size of the reference argument along its batch axis."""
    for path, leaf in leaves(tree, axes.arguments):
        if path == axes.reference:
            return size(leaf, axes.arguments[path])
    raise Unmergeable(f"{axes.reference} is missing")


def size(value: Any, batched: Batched) -> int:
    """How long a batched argument is along its batch axis."""
    if batched.axis is None:
        return len(value)
    if not isinstance(value, torch.Tensor) or value.ndim <= batched.axis:
        raise Unmergeable("an argument that was a batched tensor isn't one here")
    return int(value.shape[batched.axis])


def is_constant(value: Any) -> bool:
    """Whether two such values may be compared, and hashed by their repr."""
    return value is None or isinstance(value, Number | str | type | Enum | torch.dtype | torch.device | torch.Size)
