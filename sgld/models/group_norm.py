"""GroupNorm of few large groups, computed by all of a GPU.

Torch's kernel takes one block for each group of a sample. A picture that is decoded alone has 32 groups, an H200 132
multiprocessors: at 1024² half of the decode went there. Here batch normalisation, whose kernels take a block for each
channel, measures pieces of groups as if they were channels, and then applies what they have in common.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_HALF = (torch.float16, torch.bfloat16)
# Of a group. Smaller ones take no time worth more launches.
MIN_VALUES = 65536
# In so many pieces a group is measured: by as many blocks.
_MOST_PIECES = 64
_PIECE_EPS = 1e-12


def spread_norms(device: torch.device | None) -> AbstractContextManager[Any]:
    """While the block runs large groups are normalised by all of a GPU; elsewhere it changes nothing."""
    return _SpreadNorms() if device is not None and device.type == "cuda" else contextlib.nullcontext()


def spread_group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """As torch's `group_norm`, in float32 whatever `x` is in.

    :param x: (samples, channels, ...).
    """
    num_samples, num_channels = x.shape[:2]
    num_values = x.numel() // (num_samples * num_groups)
    pieces = x.reshape(1, -1, num_values // math.gcd(num_values, _MOST_PIECES))
    # Weights in float32 have moments in float32, too; what is normalised here is of no use.
    ones = torch.ones(pieces.shape[1], dtype=torch.float32, device=x.device)
    _, mean, rstd = torch.native_batch_norm(pieces, ones, None, None, None, True, 0.0, _PIECE_EPS)
    means, variances = (kept.view(num_samples, num_groups, -1) for kept in (mean, rstd.pow(-2) - _PIECE_EPS))
    mean = means.mean(-1)
    variance = (variances + (means - mean.unsqueeze(-1)).square()).mean(-1)
    # Each channel of each sample has moments of its own, as if all were channels of one.
    per_group = num_channels // num_groups
    mean, variance = (moment.flatten().repeat_interleave(per_group) for moment in (mean, variance))
    weight, bias = (None if given is None else given.float().repeat(num_samples) for given in (weight, bias))
    flat = x.reshape(1, num_samples * num_channels, -1)
    return functional.batch_norm(flat, mean, variance, weight, bias, training=False, eps=eps).view(x.shape)


class _SpreadNorms(TorchFunctionMode):
    """Calls of `group_norm` go elsewhere where that pays."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is functional.group_norm and _pays(*args[:2]):
            func = spread_group_norm
        return func(*args, **(kwargs or {}))


def _pays(x: torch.Tensor, num_groups: int) -> bool:
    # By the size of one sample alone, so that company changes no kernel.
    return x.dtype in _HALF and x.is_contiguous() and x.numel() >= MIN_VALUES * num_groups * len(x)
