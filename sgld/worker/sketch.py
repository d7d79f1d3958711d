"""Modules and arguments as bytes without values: what a compiler needs to know of them, and all of it.

Whatever changes how a module is compiled is in its attributes: processors, flags, kernels of attention. So these travel
as they are, and of tensors only their geometry.
"""

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sgld.outcome import message_of

_PLAIN = (torch.Tensor, nn.Parameter)


class CannotSketch(Exception):
    """Something can't be made again in another process."""


@dataclass(frozen=True)
class _Geometry:
    """A tensor without its values; `index` tells the same tensor."""

    index: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: str
    requires_grad: bool
    is_parameter: bool
    offset: int = 0
    base: "_Geometry | None" = None
    """Of which it is a view."""

    @property
    def extent(self) -> int:
        """Elements from the first of its memory to its last."""
        steps = ((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return self.offset + 1 + sum(steps) if 0 not in self.shape else 0


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self._tensors: dict[int, tuple[torch.Tensor, _Geometry]] = {}

    def persistent_id(self, obj: Any) -> _Geometry | None:
        return self._geometry(obj) if isinstance(obj, torch.Tensor) else None

    def _geometry(self, tensor: torch.Tensor) -> _Geometry:
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
            raise CannotSketch(f"tensors of type {type(tensor).__name__} can't be made of their geometry")
        if id(tensor) not in self._tensors:
            base = tensor._base
            geometry = _Geometry(
                index=len(self._tensors),
                shape=tuple(tensor.shape),
                strides=tensor.stride(),
                dtype=tensor.dtype,
                device=str(tensor.device),
                requires_grad=tensor.requires_grad,
                is_parameter=isinstance(tensor, nn.Parameter),
                offset=int(tensor.storage_offset()),
                base=None if base is None else self._geometry(base),
            )
            self._tensors[id(tensor)] = tensor, geometry
        return self._tensors[id(tensor)][1]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, *, shares: bool) -> None:
        super().__init__(file)
        self._tensors: dict[int, torch.Tensor] = {}
        self._shared: dict[tuple[str, torch.dtype], torch.Tensor] | None = {} if shares else None

    def persistent_load(self, pid: _Geometry) -> torch.Tensor:
        if pid.index not in self._tensors:
            self._tensors[pid.index] = self._made(pid)
        return self._tensors[pid.index]

    def _made(self, geometry: _Geometry) -> torch.Tensor:
        place = geometry.shape, geometry.strides, geometry.offset
        if geometry.base is not None:
            with torch.no_grad():
                return self.persistent_load(geometry.base).as_strided(*place)
        tensor = torch.empty(0, dtype=geometry.dtype, device=geometry.device)
        tensor.set_(self._memory(geometry).untyped_storage(), geometry.offset, *place[:2])
        if geometry.is_parameter:
            return nn.Parameter(tensor, requires_grad=geometry.requires_grad)
        return tensor.requires_grad_(geometry.requires_grad)

    def _memory(self, geometry: _Geometry) -> torch.Tensor:
        """Zeros; those of another tensor if they share."""
        place = geometry.device, geometry.dtype
        known = self._shared.get(place) if self._shared is not None else None
        if known is not None and known.numel() >= geometry.extent:
            return known
        memory = torch.zeros(geometry.extent, dtype=geometry.dtype, device=geometry.device)
        if self._shared is not None:
            self._shared[place] = memory
        return memory


def sketched(value: Any) -> bytes:
    """What `made` makes the same of, with other values in its tensors.

    :raises CannotSketch: it holds something that can't be made again elsewhere.
    """
    file = io.BytesIO()
    try:
        _Pickler(file).dump(value)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
        raise CannotSketch(message_of(error)) from None
    return file.getvalue()


def made(sketch: bytes, *, shares: bool = False) -> Any:
    """What was sketched, on the same devices.

    :param shares: its tensors share their memory, so that all of them take as much as the largest one.
    """
    return _Unpickler(io.BytesIO(sketch), shares=shares).load()
