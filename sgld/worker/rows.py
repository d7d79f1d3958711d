"""The rows of a forward in parts that ranks run beside one another, as both halves of guidance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from sgld.worker.axes import Batched, CallAxes, num_rows, size
from sgld.worker.trees import Path, at, closed, leaves, opened, rebuilt


@dataclass(frozen=True)
class RowAxes:
    """What of the arguments and results of one forward counts rows; all else is shared.

    `unit`: rows of one sample. `scalars`: arguments that have one element for each row.
    """

    arguments: Mapping[Path, Batched]
    results: Mapping[Path, Batched]
    scalars: frozenset[Path]
    rows: int
    unit: int

    @property
    def form(self) -> tuple[object, ...]:
        """Forwards with an equal one are parted alike."""
        return self.rows, *sorted(map(str, self.arguments))

    def parts(self, num: int) -> list[tuple[int, int]] | None:
        """Rows from and to of so many parts, as equal as they can be; None: they can't be parted like this."""
        bounds = [index * self.rows // num for index in range(num + 1)]
        sizes = {batched.size for batched in (*self.arguments.values(), *self.results.values())}
        if self.rows < num or any(bound * n % self.unit for bound in bounds for n in sizes):
            return None
        return list(pairwise(bounds))


def row_axes(axes: CallAxes, given: Any, tree: Any) -> RowAxes:
    """The axes of a forward.

    :param given: the arguments of its first call.
    :param tree: its own arguments, with those of all calls.
    """
    arguments = {path: batched for path, batched in axes.arguments.items() if _has(tree, path)}
    unit = axes.arguments[axes.reference].size
    arguments |= {
        path: Batched(0, unit) for path in axes.masks if _has(tree, path) and isinstance(at(tree, path), torch.Tensor)
    }
    scalars = {
        path
        for path, leaf in leaves(tree, axes.arguments)
        if path not in arguments
        and isinstance(leaf, torch.Tensor)
        and _has(given, path)
        and leaf.numel() > at(given, path).numel()
    }
    return RowAxes(arguments, axes.results or {}, frozenset(scalars), num_rows(tree, axes), unit)


def part(tree: Any, axes: RowAxes, start: int, stop: int) -> Any:
    """The arguments of rows from and to."""

    def take(path: Path, value: Any) -> Any:
        if path in axes.scalars:
            return value[start:stop]
        batched = axes.arguments.get(path)
        return value if batched is None else _between(value, batched, axes, start, stop)

    return rebuilt(tree, take)


def joined(results: Sequence[Any], axes: RowAxes) -> Any:
    """The result of all rows from those of the parts, in their order."""
    parts = [opened(result) for result in results]

    def join(path: Path, value: Any) -> Any:
        batched = axes.results.get(path)
        if batched is None:
            return value
        values = [at(part, path) for part in parts]
        if batched.axis is None:
            return type(value)(item for items in values for item in items)
        return torch.cat(values, dim=batched.axis)

    return closed(rebuilt(parts[0], join))


def completed(axes: RowAxes, result: Any) -> RowAxes | None:
    """The axes with those of the results, of which axis 0 counts rows where nothing else is known; None: it doesn't."""
    if axes.results:
        return axes
    found: dict[Path, Batched] = {}
    for path, leaf in leaves(opened(result)):
        if isinstance(leaf, torch.Tensor) and leaf.ndim:
            if leaf.shape[0] * axes.unit % axes.rows:
                return None
            found[path] = Batched(0, leaf.shape[0] * axes.unit // axes.rows)
    return replace(axes, results=found)


def _between(value: Any, batched: Batched, axes: RowAxes, start: int, stop: int) -> Any:
    first, last = start * batched.size // axes.unit, stop * batched.size // axes.unit
    if batched.axis is None:
        return value[first:last]
    assert size(value, batched) * axes.unit == axes.rows * batched.size
    return value.narrow(batched.axis, first, last - first)


def _has(tree: Any, path: Path) -> bool:
    try:
        at(tree, path)
    except LookupError:
        return False
    return True
