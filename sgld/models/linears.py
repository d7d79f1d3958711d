"""Linear layers with weights of eight bits, FP8 or int8, and a scale for each of their rows.

Activations may go in with eight bits, too. Each of their rows (a token) is scaled by its own largest value, or all by
one scale that the checkpoint brings: so no row depends on what others share its batch.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Activations = Literal["full", "rows", "static"]
"""Full precision; eight bits, scaled row by row; eight bits, scaled as the checkpoint says."""
FP8 = torch.float8_e4m3fn
# Below this a row is as good as zero; dividing by less would overflow.
_TINY = 1e-12


class QuantizedLinear(nn.Module):
    """A linear layer whose weight W (out, in) is `codes` (out, in; FP8 or int8) times `scale` (out, 1; float32).

    :param input_scale: one float32: what the codes of activations are multiplied by, where the checkpoint says so.
    :param dtype: of `weight`; a forward computes in the dtype of its input.
    """

    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        *,
        activations: Activations = "full",
        input_scale: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.activations: Activations = activations
        self.dtype, self.kind = dtype, codes.dtype
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.float().reshape(-1, 1).expand(codes.shape[0], 1).contiguous())
        self.register_buffer("input_scale", None if input_scale is None else input_scale.float().reshape(1))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The weight itself: models ask it for its dtype and device, and some join the weights of several layers."""
        return self._weight(self.dtype)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        # FP8 and int8 are exact in all of these dtypes. The product is rounded once: a float32 scale is read as such.
        weight: Tensor = self.codes.to(dtype).mul_(self.scale)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if self.activations == "full":
            return functional.linear(x, self._weight(x.dtype), self.bias)
        rows = x.reshape(-1, self.in_features)
        product = _fp8_product if self.kind == FP8 else _int8_product
        # Whoever has a model compute in another precision for a while may have cast its buffers, which loses nothing.
        y = product(*self._quantized(rows), self.codes.to(self.kind), self.scale.float().t(), x.dtype)
        if self.bias is not None:
            y.add_(self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _quantized(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Activations (rows, in) as codes and their scales (rows, 1)."""
        if self.activations == "static" and self.input_scale is not None:
            limit = torch.finfo(FP8).max
            codes = (rows.float() / self.input_scale).clamp_(-limit, limit).to(FP8)
            return codes, self.input_scale.expand(len(rows), 1).contiguous()
        return (fp8_rows if self.kind == FP8 else int8_rows)(rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moved, but never cast: `.to(dtype)` would undo the quantization."""
        own = {id(buffer) for buffer in self.buffers(recurse=False)}
        bits = torch.uint8

        def moved(tensor: Tensor) -> Tensor:
            return fn(tensor.view(bits)).view(tensor.dtype) if id(tensor) in own else fn(tensor)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.codes.dtype}, activations={self.activations}"


def fp8_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize (rows, n) to FP8 codes of that shape and float32 scales (rows, 1)."""
    scale = _largest(rows).div_(torch.finfo(FP8).max).clamp_(min=_TINY)
    return torch.mul(rows, scale.reciprocal(), out=torch.empty(rows.shape, dtype=FP8, device=rows.device)), scale


def int8_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize (rows, n) to int8 codes of that shape, -127 to 127, and float32 scales (rows, 1)."""
    scale = _largest(rows).div_(127).clamp_(min=_TINY)
    return torch.mul(rows, scale.reciprocal()).round_().to(torch.int8), scale


def _largest(rows: Tensor) -> Tensor:
    """The largest absolute value of each row, (rows, 1), in float32: one kernel."""
    largest: Tensor = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    return largest


def _fp8_product(x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, in) times (out, in) transposed, where the device can with FP8 kernels; scales (rows, 1) and (1, out)."""
    # Kernels read blocks of 16.
    if x.is_cuda and has_fp8(x.device) and not (codes.shape[0] % 16 or codes.shape[1] % 16):
        y = torch._scaled_mm(x, codes.t(), x_scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True)
        return y.to(dtype)
    # The same numbers, without such kernels.
    return functional.linear(x.float(), codes.float()).mul_(x_scale).mul_(scale).to(dtype)


def _int8_product(x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, in) times (out, in) transposed, exact in int32; scales (rows, 1) and (1, out)."""
    num_rows = len(x)
    if x.is_cuda:
        x, codes = for_int8_kernel(x, codes)
    product = torch._int_mm(x, codes.t())[:num_rows, : scale.shape[1]]
    # Two passes over what is the largest tensor here, in float32, rounded once.
    return torch.mul(product * x_scale, scale, out=torch.empty(product.shape, dtype=dtype, device=x.device))


def for_int8_kernel(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """With zeros around them where they are too small for CUDA's kernel: it takes over 16 rows, and blocks of 8."""
    n, k, more = -codes.shape[0] % 8, -codes.shape[1] % 8, max(0, 17 - len(x))
    x = functional.pad(x, (0, k, 0, more)) if k or more else x
    return x, functional.pad(codes, (0, k, 0, n)) if n or k else codes


@cache
def has_fp8(device: torch.device) -> bool:
    """Whether a GPU multiplies FP8: compute capability 8.9 or more."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


def quantized(linear: nn.Linear, bits: Literal["fp8", "int8"], activations: Activations) -> QuantizedLinear:
    """A linear layer with its weight quantized on the device that it is on; the bias is shared."""
    codes, scale = (fp8_rows if bits == "fp8" else int8_rows)(linear.weight.detach())
    bias = linear.bias.detach() if linear.bias is not None else None
    return QuantizedLinear(codes, scale, bias, activations=activations, dtype=linear.weight.dtype)
