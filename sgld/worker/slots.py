"""Adapters inside of a component: each row of a forward has its own.

A slot holds one combination of adapters: their matrices one behind the other, scales included. A layer that some
combination changes has the matrices of all slots in buffers of one size, and gets the slot of each row from a tensor:
so a forward with different adapters is a few batched products more, with nothing in it that depends on data.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from sgld.models.tensor_layers import part_of
from sgld.worker.adapted_layer import AdaptedLayer, Changes, Selection, computing_dtype

NONE = ""
"""The key of no adapters, which is always in slot 0."""


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


def capture_key(rows: Rows) -> tuple[object, ...]:
    """What must be equal for a captured forward to be that of these rows, beside all else."""
    slots = next((applied.slots for applied, _ in rows if applied is not None), None)
    return slots.capture_key(rows) if slots is not None else ()


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

    :param max_slots: so many are used at most, that of no adapters included.
    """

    def __init__(self, component: nn.Module, device: torch.device, max_slots: int = 2**16) -> None:
        self._max_slots = max_slots
        self._device = device
        self._dtype = computing_dtype(component) or torch.float32
        self.version = 0
        """Another one when the buffers are: what was captured with the old ones mustn't run any more."""
        self._modules = dict(component.named_modules())
        self._layers: dict[str, AdaptedLayer] = {}
        self._keys: list[str] = [NONE]
        self._fills = [0]
        """How often each slot was filled."""
        self._indices: dict[int, tuple[torch.Tensor, tuple[int, ...]]] = {}
        """By the number of rows: where the slot of each is, and which were written there last."""
        self._selection: Selection | None = None
        self._on_put: Callable[[str, Mapping[str, Changes]], None] = lambda key, changes: None
        self._on_remove: Callable[[str], None] = lambda key: None
        self._is_elsewhere: Callable[[], bool] = lambda: False
        self._join: Callable[[], None] = lambda: None

    def follow(
        self,
        put: Callable[[str, Mapping[str, Changes]], None],
        remove: Callable[[str], None],
        is_elsewhere: Callable[[], bool] = lambda: False,
        join: Callable[[], None] = lambda: None,
    ) -> None:
        """From now on somebody is told what comes into slots and leaves them.

        :param is_elsewhere: whether others alone run what adapters are selected for.
        :param join: what is launched from then on comes after forwards on other streams, which read slots.
        """
        self._on_put, self._on_remove, self._is_elsewhere, self._join = put, remove, is_elsewhere, join

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
        self._join()
        if NONE not in self._keys[1:]:
            self._keys.append(NONE)
            self._fills.append(0)
        slot = self._keys.index(NONE, 1)
        self._fills[slot] += 1
        here = {name: [(part_of(self._modules[name], one), scale) for one, scale in changes[name]] for name in changes}
        for name in here.keys() - self._layers.keys():
            like, _ = here[name][0]
            module = self._modules[name]
            place = torch.zeros(0, dtype=computing_dtype(module) or self._dtype, device=self._device)
            self._layers[name] = AdaptedLayer(module, lambda: self.selection, place, like)
            self.version += 1
        for name, layer in self._layers.items():
            self.version += layer.fill(slot, len(self._keys), here.get(name, ()), self._max_slots)
        self._keys[slot] = key
        self._on_put(key, changes)

    def remove(self, key: str) -> None:
        """Free the slot of a combination; with the last one everything is as it was before the first."""
        assert self._selection is None
        self._join()
        self._keys[self._keys.index(key)] = NONE
        if not any(self._keys):
            for layer in self._layers.values():
                layer.restore()
            self._layers, self._keys, self._fills = {}, [NONE], [0]
            self.version += 1
        self._on_remove(key)

    @contextmanager
    def selected(self, rows: Sequence[tuple[str, int]], *, by_row: bool = False) -> Iterator[None]:
        """Run a block with these combinations for so many rows each."""
        slots = [(self._keys.index(key), num) for key, num in rows]
        chosen = frozenset(slot for slot, _ in slots)
        if chosen == {0}:
            yield
            return
        index, is_by_row = None, by_row or len(chosen) > 1
        # What others run mustn't write to what a forward reads that goes on here.
        if is_by_row and not self._is_elsewhere():
            index = self._indexed(tuple(slot for slot, num in slots for _ in range(num)))
        outer, self._selection = self._selection, Selection(chosen, slots[0][0], index, tuple(rows), is_by_row)
        try:
            yield
        finally:
            self._selection = outer

    def capture_key(self, rows: Rows) -> tuple[object, ...]:
        """What must be equal for a captured forward to be that of these rows, beside all else."""
        keys = {applied.key if applied is not None else NONE for applied, _ in rows}
        if keys == {NONE}:
            return ()
        return (self.version, *sorted((slot := self._keys.index(key), self._fills[slot]) for key in keys))

    def _indexed(self, slots: tuple[int, ...]) -> torch.Tensor:
        """The slot of each row; of as many rows in the same memory each time, where graphs read it.

        It never moves: ranks have forwards of other numbers of rows, so nobody could tell the others that it did.
        """
        index, written = self._indices.get(len(slots), (None, None))
        if index is None:
            index = torch.zeros(len(slots), dtype=torch.long, device=self._device)
        if written != slots:
            index.copy_(torch.tensor(slots))
            self._indices[len(slots)] = index, slots
        return index

    @property
    def selection(self) -> "Selection | None":
        return self._selection
