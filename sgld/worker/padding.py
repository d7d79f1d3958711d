"""Text of different lengths in one forward: rows are padded with zeros on the right, and masks say where.

Which axis of which argument counts tokens, and whether there is a mask, the pipeline shows itself when it is given two
prompts of different lengths at once. That padding is exact only a proof says.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from sgld.worker.axes import CallAxes, Mask
from sgld.worker.trees import Path, at, leaves


def with_padding(axes: CallAxes, one: Any, mixed: Any) -> CallAxes:
    """The axes completed by what a pipeline pads; as they were where it pads nothing, or not on the right.

    :param one: the arguments of a call for one prompt.
    :param mixed: those for that prompt and a longer one, with their values.
    """
    lengths = {path: axis for path in axes.arguments if (axis := _longer_axis(axes, one, mixed, path)) is not None}
    if axes.reference in lengths:
        return axes
    given = [at(mixed, path) for path in lengths if at(mixed, path).ndim == 2]
    masks = {}
    for path, leaf in leaves(one):
        made = _leaf(mixed, path)
        like = next((p for p, axis in lengths.items() if _counts(made, at(mixed, p), axis)), None)
        if leaf is None and like is not None:
            masks[path] = Mask(like, made.dtype)
            given.append(made)
    return replace(axes, lengths=lengths, masks=masks) if all(map(_is_padded_right, given)) else axes


def _leaf(tree: Any, path: Path) -> Any:
    try:
        return at(tree, path)
    except LookupError:
        return None


def _longer_axis(axes: CallAxes, one: Any, mixed: Any, path: Path) -> int | None:
    """The only axis, apart from that of the samples, that is longer with a longer prompt."""
    short, long = _leaf(one, path), _leaf(mixed, path)
    if not (isinstance(short, torch.Tensor) and isinstance(long, torch.Tensor) and short.ndim == long.ndim):
        return None
    batch_axis = axes.arguments[path].axis
    changed = [n for n in range(short.ndim) if n != batch_axis and short.shape[n] != long.shape[n]]
    return changed[0] if len(changed) == 1 and short.shape[changed[0]] < long.shape[changed[0]] else None


def _counts(mask: Any, like: torch.Tensor, axis: int) -> bool:
    """Whether this has a number for each token of each row."""
    return isinstance(mask, torch.Tensor) and mask.shape == (like.shape[0], like.shape[axis])


def _is_padded_right(mask: torch.Tensor) -> bool:
    """Whether each row is ones and then zeros, if any, and some have zeros."""
    ones = mask.eq(1)
    in_order = bool((ones[:, :-1] >= ones[:, 1:]).all())
    return in_order and bool((ones | mask.eq(0)).all()) and not bool(ones.all())


def padded(values: Sequence[torch.Tensor], axis: int) -> list[torch.Tensor]:
    """The tensors with zeros at the end of an axis, as long as the longest one."""
    longest = max(value.shape[axis] for value in values)
    return [torch.cat([value, _zeros(value, axis, longest - value.shape[axis])], dim=axis) for value in values]


def _zeros(like: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    shape = list(like.shape)
    shape[axis] = length
    return like.new_zeros(shape)


def mask_of(values: Sequence[torch.Tensor], axis: int, dtype: torch.dtype) -> torch.Tensor | None:
    """(rows, tokens): where the padded tensors are not padding. None if they are equally long."""
    if len({value.shape[axis] for value in values}) == 1:
        return None
    ones = [value.new_ones((value.shape[0], value.shape[axis]), dtype=dtype) for value in values]
    return torch.cat(padded(ones, 1))
