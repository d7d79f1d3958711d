"""Arguments and results on their way between ranks: their tree by the wire, large tensors from device to device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sgld.worker.axes import is_constant
from sgld.worker.trees import Opened, Path, closed, leaves, opened, rebuilt

# Where tensors begin in a buffer: kernels may ask for as much.
_ALIGNMENT = 256


class Unsendable(Exception):
    """An argument has a state, so ranks can't have a copy of it."""


@dataclass(frozen=True)
class Hole:
    """Where a tensor of the device was in a tree."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    """In bytes, in the buffer with all of them."""


@dataclass(frozen=True)
class _Here:
    """The device of a rank, which each has for itself."""


@dataclass(frozen=True)
class _Drawing:
    """A generator, which goes on from this state on each rank: most decoders are given one and draw nothing."""

    device_type: str
    state: torch.Tensor

    def made(self, device: torch.device) -> torch.Generator:
        generator = torch.Generator("cpu" if self.device_type == "cpu" else device)
        generator.set_state(self.state)
        return generator


@dataclass(frozen=True)
class Parcel:
    """A tree without the tensors of the device, and the size of the buffer that holds these."""

    tree: Any
    num_bytes: int


def packed(tree: Any, device: torch.device) -> tuple[Parcel, torch.Tensor | None]:
    """A tree, and a buffer (num_bytes,) uint8 on the device with its tensors there; None where it has none.

    Tensors on the host stay in the tree. On a CPU these are all.

    :raises Unsendable: there is an object in it that may have a state.
    """
    tensors: list[torch.Tensor] = []
    end = 0

    def pack(path: Path, value: Any) -> Any:
        nonlocal end
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            hole = Hole(tuple(value.shape), value.dtype, end)
            end += math.ceil(value.nbytes / _ALIGNMENT) * _ALIGNMENT
            tensors.append(value)
            return hole
        if isinstance(value, torch.device) and value.type != "cpu":
            return _Here()
        if isinstance(value, torch.Tensor):
            return _compact(value.detach())
        if isinstance(value, torch.Generator):
            return _Drawing(value.device.type, value.get_state())
        if not isinstance(value, dict | list | tuple | Opened | torch.Size) and not is_constant(value):
            raise Unsendable(f"argument {'.'.join(map(str, path[1:]))} is a {type(value).__name__}")
        return value

    bare = rebuilt(opened(tree), pack)
    if not tensors:
        return Parcel(bare, 0), None
    buffer = torch.empty(end, dtype=torch.uint8, device=device)
    for hole, tensor in zip(_holes(bare), tensors, strict=True):
        _view(buffer, hole).copy_(tensor)
    return Parcel(bare, end), buffer


def space_for(parcel: Parcel, device: torch.device) -> torch.Tensor | None:
    """Where the tensors of a parcel are put when they come; None where it has none."""
    if not parcel.num_bytes:
        return None
    return torch.empty(parcel.num_bytes, dtype=torch.uint8, device=device)


def unpacked(parcel: Parcel, buffer: torch.Tensor | None, device: torch.device) -> Any:
    """The tree with its tensors, which are views of the buffer."""

    def unpack(_path: Path, value: Any) -> Any:
        if isinstance(value, Hole):
            assert buffer is not None
            return _view(buffer, value)
        if isinstance(value, _Drawing):
            return value.made(device)
        return device if isinstance(value, _Here) else value

    return closed(rebuilt(parcel.tree, unpack))


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with no more memory behind it than its own: all of that is sent."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _holes(tree: Any) -> Sequence[Hole]:
    return [leaf for _, leaf in leaves(tree) if isinstance(leaf, Hole)]


def _view(buffer: torch.Tensor, hole: Hole) -> torch.Tensor:
    num_bytes = math.prod(hole.shape) * hole.dtype.itemsize
    return buffer[hole.start : hole.start + num_bytes].view(hole.dtype).view(hole.shape)
