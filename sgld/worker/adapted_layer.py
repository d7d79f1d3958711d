"""One layer with what the adapters in all slots add to it, row by row."""

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sgld.models.lora import LoraLayer
from sgld.models.tensor_layers import SummedLinear

Changes = Sequence[tuple[LoraLayer, float]]
"""What a combination does to one layer: changes with their scales."""
_Function = Callable[..., torch.Tensor]
_CONVOLUTIONS: dict[type[nn.Module], _Function] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}
# Ranks are rounded up to this, so that most adapters fit into the buffers of others.
_RANK_STEP = 8


class Unmixable(Exception):
    """A layer works on something else than the rows of the forward, so it can't tell whose adapter it is."""


@dataclass(frozen=True)
class Selection:
    """The slots of a forward: all rows have `slot`, or each has its own in `index`, if it runs here."""

    slots: frozenset[int]
    slot: int
    index: torch.Tensor | None
    rows: tuple[tuple[str, int], ...]
    is_by_row: bool


class AdaptedLayer:
    """The matrices of all slots are (slots, rank, in), (slots, rank, out), and biases (slots, out).

    :param selection: the slots of the forward that goes on; None: no adapter is selected.
    :param place: a tensor of the device and dtype of these.
    :param like: a change of the layer, which tells their sizes.
    """

    def __init__(
        self, module: nn.Module, selection: Callable[[], Selection | None], place: torch.Tensor, like: LoraLayer
    ) -> None:
        self._module = module
        self._selection = selection
        self._ranks: list[int] = []
        num_in, num_out = like.down.shape[1], like.up.shape[0]
        self._down, self._up = place.new_zeros(0, 0, num_in), place.new_zeros(0, 0, num_out)
        self._bias = place.new_zeros(0, num_out)
        self._views: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}
        self._place = _place_of(module)
        self._had_forward = "forward" in vars(self._place)
        self._forward = self._place.forward
        self._function: _Function | None = next(
            (f for kind, f in _CONVOLUTIONS.items() if isinstance(module, kind)), None
        )
        self._place.forward = types.MethodType(_forward_of(self), module)

    @property
    def size_bytes(self) -> int:
        return self._down.nbytes + self._up.nbytes + self._bias.nbytes

    def restore(self) -> None:
        """Leave the module as it was; where something else has put this layer back later, it adds nothing."""
        self._ranks.clear()
        if self._had_forward:
            self._place.forward = self._forward
        else:
            vars(self._place).pop("forward", None)

    def fill(self, slot: int, num_slots: int, changes: Changes, max_slots: int) -> bool:
        """Write the matrices of a slot; true if that took other buffers."""
        self._ranks += [0] * (num_slots - len(self._ranks))
        self._ranks[slot] = sum(change.rank for change, _ in changes)
        # Doubled, so that not each further slot is another copy.
        num = num_slots if num_slots <= len(self._down) else min(max_slots, max(num_slots, 2 * len(self._down)))
        is_larger = self._make_room(num, self._ranks[slot], any(change.bias is not None for change, _ in changes))
        self._views.clear()
        self._down[slot], self._up[slot] = 0, 0
        self._bias[slot : slot + 1] = 0
        start = 0
        for change, scale in changes:
            stop = start + change.rank
            self._down[slot, start:stop] = change.down.to(self._down)
            # On the device, as forwards wait for it.
            self._up[slot, start:stop] = (change.up.to(self._up.device).float() * scale).T
            if change.bias is not None:
                self._bias[slot] += change.bias.to(self._up.device).float() * scale
            start = stop
        return is_larger

    def _make_room(self, num_slots: int, rank: int, has_bias: bool) -> bool:
        """Have buffers that hold so much, with what the old ones hold; true if they are others."""
        old, old_rank, num_in = self._down.shape
        num_slots, rank = max(old, num_slots), max(old_rank, -(-rank // _RANK_STEP) * _RANK_STEP)
        is_larger = (num_slots, rank) != (old, old_rank)
        if is_larger:
            # Both or, where memory is too small, none.
            down, up = _grown(self._down, num_slots, rank, num_in), _grown(self._up, num_slots, rank, self._up.shape[2])
            self._down, self._up = down, up
        if len(self._bias) < num_slots and (has_bias or len(self._bias)):
            self._bias, is_larger = _grown(self._bias, num_slots, self._bias.shape[1]), True
        return is_larger

    def run(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's own forward, with what the adapters of this forward add to it.

        :raises Unmixable: adapters differ, and the layer gets something else than the rows that have them.
        """
        result: torch.Tensor = self._forward(x, *args, **kwargs)
        selection = self._selection()
        if selection is None or not self._ranks or not any(self._ranks[slot] for slot in selection.slots):
            return result
        index = selection.index
        if index is not None and (x.ndim < 2 or x.shape[0] != len(index)):
            raise Unmixable(f"a layer with adapters gets a tensor of shape {tuple(x.shape)}, not {len(index)} rows")
        # Where it computes in something else than what its weights are in, as inside of autocast.
        base = result if result.dtype == self._down.dtype else None
        x = x.to(self._down.dtype)
        changed = self._of_all(base, x, selection.slot) if index is None else self._of_each(base, x, index)
        return changed if base is not None else result + changed.to(result.dtype)

    def _of_all(self, base: torch.Tensor | None, x: torch.Tensor, slot: int) -> torch.Tensor:
        """All rows have one slot. Only its own ranks take part: the result doesn't depend on other slots."""
        down, up, bias = self._parts_of(slot)
        if self._function is not None:
            inner = self._convolved(x, down)
            change = self._function(inner, up.T.reshape(*up.T.shape, *[1] * (x.ndim - 2)), bias)
            return change if base is None else base + change
        inner = self._summed(functional.linear(x, down))
        flat = None if base is None else base.reshape(-1, up.shape[1])
        change = _sum(flat, inner.reshape(-1, up.shape[0]), up).reshape(*x.shape[:-1], up.shape[1])
        return change if bias is None else change + bias

    def _of_each(self, base: torch.Tensor | None, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Each row has its own slot."""
        down, up = self._down.index_select(0, index), self._up.index_select(0, index)
        num, (_, rank, num_out) = len(index), up.shape
        bias = self._bias.index_select(0, index) if len(self._bias) else None
        if self._function is None:
            inner = self._summed(torch.bmm(x.reshape(num, -1, x.shape[-1]), down.transpose(1, 2)))
            flat = None if base is None else base.reshape(num, -1, num_out)
            change = _sum(flat, inner, up)
            return (change if bias is None else change + bias[:, None]).reshape(*x.shape[:-1], num_out)
        # Each row is a group of channels of one sample.
        inner = self._convolved(x.reshape(1, num * x.shape[1], *x.shape[2:]), down.flatten(0, 1), groups=num)
        flat = None if base is None else base.reshape(num, num_out, -1)
        change = _sum(flat, up.transpose(1, 2), inner.reshape(num, rank, -1))
        return (change if bias is None else change + bias[:, :, None]).reshape(num, num_out, *inner.shape[2:])

    def _summed(self, inner: torch.Tensor) -> torch.Tensor:
        """Over the parts that ranks have of the inputs."""
        return self._module.team.sum(inner) if isinstance(self._module, SummedLinear) else inner

    def _parts_of(self, slot: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The matrices of a slot; made once, as a view takes as long as the launch of a small product."""
        if slot not in self._views:
            rank, has_bias = self._ranks[slot], bool(len(self._bias))
            bias = self._bias[slot] if has_bias else None
            self._views[slot] = self._down[slot, :rank], self._up[slot, :rank], bias
        return self._views[slot]

    def _convolved(self, x: torch.Tensor, down: torch.Tensor, groups: int = 1) -> torch.Tensor:
        module: Any = self._module
        weight = down.reshape(len(down), module.in_channels, *module.kernel_size)
        assert self._function is not None
        return self._function(x, weight, None, module.stride, module.padding, module.dilation, groups)


def _place_of(module: nn.Module) -> Any:
    """What has the forward of a layer, below hooks of diffusers: these may join the tokens that ranks have."""
    hooks = getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ())
    return hooks[0] if hooks else module


def _forward_of(layer: AdaptedLayer) -> Any:
    def forward(_module: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return layer.run(x, *args, **kwargs)

    # Compiled code would be made anew for each combination of slots; so a layer with adapters is not part of it.
    return torch.compiler.disable(forward)  # type: ignore[no-untyped-call]


def _sum(base: torch.Tensor | None, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The product of two matrices, or of each pair, added to a base in one kernel."""
    if base is None:
        return one @ other
    return torch.addmm(base, one, other) if one.ndim == 2 else torch.baddbmm(base, one, other)


def _grown(old: torch.Tensor, *shape: int) -> torch.Tensor:
    new = old.new_zeros(shape)
    new[tuple(slice(n) for n in old.shape)] = old
    return new


def computing_dtype(module: nn.Module) -> torch.dtype | None:
    """What it computes in: its own word first, as weights may be quantized; None: nothing tells."""
    said = (getattr(module, "dtype", None), *(parameter.dtype for parameter in module.parameters()))
    floats = (dtype for dtype in said if isinstance(dtype, torch.dtype) and dtype.is_floating_point)
    return next((dtype for dtype in floats if dtype.itemsize > 1), None)
