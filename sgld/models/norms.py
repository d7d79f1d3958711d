"""Norms of encoders and decoders of pictures, computed by all of a GPU and in few passes.

Torch's kernel of GroupNorm takes one block for each group of a sample. A picture that is decoded alone has 32 groups,
an H200 132 multiprocessors: at 1024² half of the decode went there. Here batch normalisation, whose kernels take a
block for each channel, measures pieces of groups as if they were channels, and then applies what they have in common.

Decoders of videos normalise over channels in seven passes over memory, some of them in float32. Torch has one kernel
for what these compute.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_HALF = (torch.float16, torch.bfloat16)
# Of a group. Smaller ones take no time worth more launches.
MIN_VALUES = 65536
# In so many pieces a group is measured: by as many blocks.
_MOST_PIECES = 64
_PIECE_EPS = 1e-12
# The square of what `normalize` divides by at least.
_RMS_EPS = 1e-24
_STEERABLE: set[type[nn.Module]] = set()
_PREPARED: WeakSet[nn.Module] = WeakSet()
"""Components all of whose norms are steerable: to look for these takes a while, and a replay of a graph doesn't."""
_ARE_FAST = ContextVar("_ARE_FAST", default=False)


def fast_norms(module: nn.Module, device: torch.device | None) -> AbstractContextManager[Any]:
    """While the block runs norms of a component are computed faster, if it is on a GPU; elsewhere nothing changes.

    To about what torch computes: their results differ by the rounding of half precision, and float32 stays as it is.
    """
    return _fast_norms(module) if device is not None and device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def _fast_norms(module: nn.Module) -> Iterator[None]:
    if module not in _PREPARED:
        for kind in {type(part) for part in module.modules() if _is_rms_norm(part)} - _STEERABLE:
            _make_steerable(kind)
        _PREPARED.add(module)
    token = _ARE_FAST.set(True)
    try:
        with _SpreadNorms():
            yield
    finally:
        _ARE_FAST.reset(token)


def fused_rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """What diffusers' `RMS_norm` of Wan, Qwen-Image and HunyuanVideo computes, by torch's kernel.

    :param norm: has `gamma`, `bias` and `channel_first` as they have.
    """
    dim = 1 if norm.channel_first else -1
    last = functional.rms_norm(x.movedim(dim, -1), (x.shape[dim],), norm.gamma.flatten(), _RMS_EPS)
    result = last.movedim(-1, dim)
    return result + norm.bias if isinstance(norm.bias, torch.Tensor) else result


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


def _is_rms_norm(part: nn.Module) -> bool:
    # Models of diffusers have copies of one class.
    return all(hasattr(part, name) for name in ("gamma", "bias", "scale", "channel_first"))


def _make_steerable(kind: type[nn.Module]) -> None:
    """From now on these heed what holds where they run."""
    _STEERABLE.add(kind)
    plain: Callable[[nn.Module, torch.Tensor], torch.Tensor] = kind.forward

    @functools.wraps(plain)
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (fused_rms_norm if _ARE_FAST.get() and x.dtype in _HALF else plain)(self, x)

    kind.forward = forward
