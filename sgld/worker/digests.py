"""What is known of the values of tensors, read from the device once and kept as long as they live unchanged."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from sgld.worker.axes import is_constant
from sgld.worker.trees import leaves


class Digests:
    """Digests of values. What isn't known yet of several values is read from their device in one transfer."""

    def __init__(self) -> None:
        self._digests: Any = WeakTensorKeyDictionary()
        self._zeros: Any = WeakTensorKeyDictionary()

    def of(self, *values: Any) -> list[str]:
        """One for each value: equal for equal values; what can't be compared is equal to itself only."""
        trees = [list(leaves(value)) for value in values]
        tensors = [leaf for tree in trees for _, leaf in tree if isinstance(leaf, torch.Tensor)]
        known = self._known(self._digests, tensors, digests)
        return ["|".join(f"{path}={_of_leaf(leaf, known)}" for path, leaf in tree) for tree in trees]

    def are_zero(self, *tensors: torch.Tensor) -> list[bool]:
        """Of each tensor: is it zero everywhere?"""
        known = self._known(self._zeros, tensors, _are_zero)
        return [known[id(tensor)] for tensor in tensors]

    def _known(self, kept: Any, tensors: Sequence[torch.Tensor], compute: Any) -> dict[int, Any]:
        """What `compute` says of each tensor, by its id; kept as long as nobody writes to it."""
        found, unknown = {}, {}
        for tensor in tensors:
            known = None if tensor.is_inference() else kept.get(tensor)  # that one doesn't count what is written to it
            if known is not None and known[0] == tensor._version:
                found[id(tensor)] = known[1]
            else:
                unknown[id(tensor)] = tensor
        for device in {tensor.device for tensor in unknown.values()}:
            there = [tensor for tensor in unknown.values() if tensor.device == device]
            for tensor, value in zip(there, compute(there), strict=True):
                found[id(tensor)] = value
                if not tensor.is_inference():
                    kept[tensor] = (tensor._version, value)
        return found


def _of_leaf(leaf: Any, known: dict[int, str]) -> str:
    if isinstance(leaf, torch.Tensor):
        return known[id(leaf)]
    return repr(leaf) if is_constant(leaf) else f"object {id(leaf)}"


def digests(tensors: Sequence[torch.Tensor]) -> Iterable[str]:
    """Of the bytes of tensors on one device."""
    parts = [_bytes(tensor) for tensor in tensors]
    data = torch.split(torch.cat(parts).cpu(), [len(part) for part in parts])
    for tensor, part in zip(tensors, data, strict=True):
        digest = hashlib.sha1(part.numpy().tobytes(), usedforsecurity=False).hexdigest()
        yield f"{tensor.dtype}{tuple(tensor.shape)}{digest}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    flat = real.detach().resolve_neg().reshape(-1)
    # Even one element may have a stride of zero, with which it has no view as bytes.
    return flat.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _are_zero(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Of tensors on one device."""
    return torch.stack([(tensor == 0).all() for tensor in tensors]).tolist()
