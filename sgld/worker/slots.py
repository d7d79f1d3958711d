"""Adapters inside of a component: each row of a forward has its own.

A slot holds one combination of adapters: their matrices one behind the other, scales included. A layer that some
combination changes has the matrices of all slots in buffers of one size, and gets the slot of each row from a tensor:
so a forward with different adapters is a few batched products more, with nothing in it that depends on data.
"""

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sgld.models.lora import LoraLayer

NONE = ""
"""The key of no adapters, which is always in slot 0."""
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
class Applied:
    """A combination of adapters in a component, by its key."""

    slots: "Slots"
    key: str

    def __repr__(self) -> str:
        return f"Applied({self.key})"


Rows = Sequence[tuple[Applied | None, int]]
"""Of each call of a forward, in order: its adapters, and the number of its rows."""


@contextmanager
def selected(rows: Rows, *, by_row: bool = False) -> Iterator[None]:
    """Run a block with these adapters in the component.

    :param by_row: use the slot of each row, even if all have the same: what a proof compares differs in nothing else.
    """
    slots = next((applied.slots for applied, _ in rows if applied is not None), None)
    if slots is None:
        yield
        return
    with slots.selected([(applied.key if applied is not None else NONE, num) for applied, num in rows], by_row=by_row):
        yield


@contextmanager
def everywhere(applied: Iterable[Applied]) -> Iterator[None]:
    """Run a block with one request's adapters in all components."""
    with ExitStack() as stack:
        for one in applied:
            stack.enter_context(selected([(one, 1)]))
        yield


class Slots:
    """The slots of one component. Between forwards no adapter is selected.

    Its layers call what was their `forward` before, so whatever else was done to them goes on. As an attribute of the
    instance it is no hook, of which others would have to know.
    """

    def __init__(self, component: nn.Module, device: torch.device) -> None:
        self._device = device
        self._dtype = _dtype_of(component)
        self.version = 0
        """Another one when the buffers are: what was captured with the old ones mustn't run any more."""
        self._modules = dict(component.named_modules())
        self._layers: dict[str, _Layer] = {}
        self._keys: list[str] = [NONE]
        self._index = torch.zeros(0, dtype=torch.long, device=device)
        self._in_index: tuple[int, ...] = ()
        self._selection: _Selection | None = None

    @property
    def keys(self) -> list[str]:
        """The combinations that are there; in the place of one that was removed is NONE."""
        return self._keys[1:]

    @property
    def size_bytes(self) -> int:
        """Memory of the device that the buffers take."""
        return sum(layer.size_bytes for layer in self._layers.values())

    def put(self, key: str, changes: Mapping[str, Changes]) -> None:
        """Put a combination into a slot of its own, a free one if there is one.

        :param changes: module name to what is done there.
        """
        assert self._selection is None, "a forward goes on"
        assert key not in self._keys
        if NONE not in self._keys[1:]:
            self._keys.append(NONE)
        slot = self._keys.index(NONE, 1)
        for name in changes.keys() - self._layers.keys():
            like, _ = changes[name][0]
            place = torch.zeros(0, dtype=self._dtype, device=self._device)
            self._layers[name] = _Layer(self._modules[name], self, place, like)
            self.version += 1
        for name, layer in self._layers.items():
            self.version += layer.fill(slot, len(self._keys), changes.get(name, ()))
        self._keys[slot] = key

    def remove(self, key: str) -> None:
        """Free the slot of a combination; with the last one everything is as it was before the first."""
        assert self._selection is None
        self._keys[self._keys.index(key)] = NONE
        if not any(self._keys):
            for layer in self._layers.values():
                layer.restore()
            self._layers, self._keys = {}, [NONE]
            self.version += 1

    @contextmanager
    def selected(self, rows: Sequence[tuple[str, int]], *, by_row: bool = False) -> Iterator[None]:
        """Run a block with these combinations for so many rows each."""
        slots = [(self._keys.index(key), num) for key, num in rows]
        chosen = frozenset(slot for slot, _ in slots)
        if chosen == {0}:
            yield
            return
        index = None
        if by_row or len(chosen) > 1:
            index = self._indexed(tuple(slot for slot, num in slots for _ in range(num)))
        self._selection = _Selection(chosen, slots[0][0], index)
        try:
            yield
        finally:
            self._selection = None

    def capture_key(self, rows: Rows) -> tuple[object, ...]:
        """What must be equal for a captured forward to be that of these rows, beside all else."""
        keys = {applied.key if applied is not None else NONE for applied, _ in rows}
        return (self.version, *sorted(keys)) if keys != {NONE} else ()

    def _indexed(self, slots: tuple[int, ...]) -> torch.Tensor:
        """The slot of each row, in the same memory each time."""
        if len(self._index) < len(slots):
            self._index = self._index.new_zeros(2 * len(slots))
            self._in_index = ()
            self.version += 1
        if self._in_index != slots:
            self._index[: len(slots)].copy_(torch.tensor(slots))
            self._in_index = slots
        return self._index[: len(slots)]

    @property
    def selection(self) -> "_Selection | None":
        return self._selection


@dataclass(frozen=True)
class _Selection:
    """The slots of a forward: all rows have `slot`, or each has its own in `index`."""

    slots: frozenset[int]
    slot: int
    index: torch.Tensor | None


class _Layer:
    """One layer with the matrices of all slots: (slots, rank, in), (slots, rank, out), (slots, out)."""

    def __init__(self, module: nn.Module, slots: Slots, place: torch.Tensor, like: LoraLayer) -> None:
        self._module = module
        self._slots = slots
        self._ranks: list[int] = []
        num_in, num_out = like.down.shape[1], like.up.shape[0]
        self._down, self._up = place.new_zeros(0, 0, num_in), place.new_zeros(0, 0, num_out)
        self._bias = place.new_zeros(0, num_out)
        self._had_forward = "forward" in vars(module)
        self._forward = module.forward
        self._function: _Function | None = next(
            (f for kind, f in _CONVOLUTIONS.items() if isinstance(module, kind)), None
        )
        module.forward = types.MethodType(_forward_of(self), module)

    @property
    def size_bytes(self) -> int:
        return self._down.nbytes + self._up.nbytes + self._bias.nbytes

    def restore(self) -> None:
        """Leave the module as it was."""
        if self._had_forward:
            self._module.forward = self._forward
        else:
            vars(self._module).pop("forward", None)

    def fill(self, slot: int, num_slots: int, changes: Changes) -> bool:
        """Write the matrices of a slot; true if that took other buffers."""
        self._ranks += [0] * (num_slots - len(self._ranks))
        self._ranks[slot] = sum(change.rank for change, _ in changes)
        is_larger = self._make_room(num_slots, self._ranks[slot], any(c.bias is not None for c, _ in changes))
        self._down[slot], self._up[slot] = 0, 0
        self._bias[slot : slot + 1] = 0
        start = 0
        for change, scale in changes:
            stop = start + change.rank
            self._down[slot, start:stop] = change.down.to(self._down)
            self._up[slot, start:stop] = (change.up.float() * scale).T.to(self._up)
            if change.bias is not None:
                self._bias[slot] += (change.bias.float() * scale).to(self._bias)
            start = stop
        return is_larger

    def _make_room(self, num_slots: int, rank: int, has_bias: bool) -> bool:
        """Have buffers that hold so much, with what the old ones hold; true if they are others."""
        old, old_rank, num_in = self._down.shape
        # Doubled, so that not each further slot is another copy.
        num = old if num_slots <= old else max(num_slots, 2 * old)
        num_ranks = max(old_rank, -(-rank // _RANK_STEP) * _RANK_STEP)
        is_larger = (num, num_ranks) != (old, old_rank)
        if is_larger:
            self._down = _grown(self._down, num, num_ranks, num_in)
            self._up = _grown(self._up, num, num_ranks, self._up.shape[2])
        if len(self._bias) < num and (has_bias or len(self._bias)):
            self._bias, is_larger = _grown(self._bias, num, self._bias.shape[1]), True
        return is_larger

    def change(self, x: torch.Tensor) -> torch.Tensor | None:
        """What the adapters of this forward add to the layer's output; None: nothing."""
        selection = self._slots.selection
        if selection is None or not any(self._ranks[slot] for slot in selection.slots):
            return None
        x = x.to(self._down.dtype)
        if selection.index is None:
            return self._of_all(x, selection.slot)
        if x.ndim < 2 or x.shape[0] != len(selection.index):
            raise Unmixable(
                f"a layer with adapters gets a tensor of shape {tuple(x.shape)}, not {len(selection.index)} rows"
            )
        return self._of_each(x, selection.index)

    def _of_all(self, x: torch.Tensor, slot: int) -> torch.Tensor:
        """All rows have one slot. Only its own ranks take part: the result doesn't depend on other slots."""
        rank = self._ranks[slot]
        down, up = self._down[slot, :rank], self._up[slot, :rank]
        bias = self._bias[slot] if len(self._bias) else None
        if self._function is None:
            return functional.linear(functional.linear(x, down), up.T, bias)
        inner = self._convolved(x, down)
        return self._function(inner, up.T.reshape(*up.T.shape, *[1] * (x.ndim - 2)), bias)

    def _of_each(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Each row has its own slot."""
        down, up = self._down.index_select(0, index), self._up.index_select(0, index)
        num = len(index)
        if self._function is None:
            inner = torch.bmm(x.reshape(num, -1, x.shape[-1]), down.transpose(1, 2))
            change = torch.bmm(inner, up)
            if len(self._bias):
                change = change + self._bias.index_select(0, index)[:, None]
            return change.reshape(*x.shape[:-1], up.shape[-1])
        # Each row is a group of channels of one sample.
        grouped = x.reshape(1, num * x.shape[1], *x.shape[2:])
        inner = self._convolved(grouped, down.flatten(0, 1), groups=num)
        change = torch.bmm(up.transpose(1, 2), inner.reshape(num, up.shape[1], -1))
        if len(self._bias):
            change = change + self._bias.index_select(0, index)[:, :, None]
        return change.reshape(num, up.shape[-1], *inner.shape[2:])

    def _convolved(self, x: torch.Tensor, down: torch.Tensor, groups: int = 1) -> torch.Tensor:
        module: Any = self._module
        weight = down.reshape(len(down), module.in_channels, *module.kernel_size)
        assert self._function is not None
        return self._function(x, weight, None, module.stride, module.padding, module.dilation, groups)

    def run(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's own forward, and the change of its adapters."""
        result: torch.Tensor = self._forward(x, *args, **kwargs)
        change = self.change(x)
        return result if change is None else result + change.to(result.dtype)


def _forward_of(layer: _Layer) -> Any:
    def forward(_module: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return layer.run(x, *args, **kwargs)

    return forward


def _grown(old: torch.Tensor, *shape: int) -> torch.Tensor:
    new = old.new_zeros(shape)
    new[tuple(slice(n) for n in old.shape)] = old
    return new


def _dtype_of(component: nn.Module) -> torch.dtype:
    """What the component computes in; its own word first, as weights may be quantized."""
    said = getattr(component, "dtype", None)
    if isinstance(said, torch.dtype) and said.is_floating_point and said.itemsize > 1:
        return said
    dtypes = (parameter.dtype for parameter in component.parameters())
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), torch.bfloat16)
