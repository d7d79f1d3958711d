"""How far results of calls are from one another."""

from typing import Any

import torch

from sgld.worker.axes import is_constant
from sgld.worker.trees import leaves, opened


def relative_error(result: Any, expected: Any) -> float:
    """Largest ‖result - expected‖ / ‖expected‖ over the tensors.

    NaN if one is not a number; infinite if something else than the values of tensors differs.
    """
    errors = [0.0]
    for (path, value), (other, reference) in zip(leaves(opened(result)), leaves(opened(expected)), strict=True):
        if path != other or not _is_alike(value, reference):
            return float("inf")
        if isinstance(value, torch.Tensor):
            wide = torch.complex128 if reference.is_complex() else torch.float64
            norm = reference.to(wide).norm()
            errors.append(float((value.to(wide) - reference.to(wide)).norm() / norm.clamp_min(1e-30)))
    return max(errors, key=lambda error: (error != error, error))


def _is_alike(value: Any, reference: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return isinstance(reference, torch.Tensor) and value.shape == reference.shape
    return value is reference or bool(is_constant(value) and value == reference)
