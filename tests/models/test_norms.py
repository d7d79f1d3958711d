"""Norms are computed by other kernels, to the same values."""

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuanimage_refiner import HunyuanImageRefinerRMS_norm
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15RMS_norm
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageRMS_norm
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import nn
from torch.nn import functional

from sgld.models.norms import MIN_VALUES, fast_norms, fused_rms_norm, spread_group_norm

CUDA = torch.device("cuda")
LARGE = (1, 4, MIN_VALUES // 2)
"""Two groups are just large enough."""


def values(*shape: int, mean: float = 3.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2 + mean


@pytest.mark.parametrize("shape", [(1, 8, 64, 32), (3, 8, 16, 16), (2, 8, 3, 16, 16), (2, 8, 100)])
@pytest.mark.parametrize("num_groups", [1, 4, 8])
def test_computes_what_torch_does(shape: tuple[int, ...], num_groups: int) -> None:
    x = values(*shape)
    for weight, bias in ((values(8), values(8)), (None, None)):
        torch.testing.assert_close(
            spread_group_norm(x, num_groups, weight, bias, eps=1e-6),
            functional.group_norm(x, num_groups, weight, bias, eps=1e-6),
            atol=1e-5,
            rtol=1e-5,
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_it_is_as_near_to_the_truth_as_torch(dtype: torch.dtype) -> None:
    x, weight, bias = (given.to(dtype) for given in (values(*LARGE, mean=20.0), values(4), values(4)))
    truth = functional.group_norm(x.double(), 2, weight.double(), bias.double())
    ours, torchs = spread_group_norm(x, 2, weight, bias), functional.group_norm(x, 2, weight, bias)
    assert ours.dtype is dtype
    assert (ours.double() - truth).norm() <= 1.01 * (torchs.double() - truth).norm()


def test_what_does_not_vary_becomes_zero() -> None:
    assert torch.equal(spread_group_norm(torch.full((1, 4, 256), 3.0), 2), torch.zeros(1, 4, 256))


@pytest.mark.parametrize(
    ("x", "is_spread"),
    [
        (values(*LARGE).bfloat16(), True),
        (values(*LARGE), False),
        (values(1, 4, MIN_VALUES // 2 - 1).bfloat16(), False),
        # Each of two samples is too small, in company as alone.
        (values(2, 4, MIN_VALUES // 4).bfloat16(), False),
        (values(1, MIN_VALUES, 4).bfloat16().transpose(1, 2), False),
    ],
)
def test_only_large_groups_in_half_precision_take_other_kernels(x: torch.Tensor, is_spread: bool) -> None:
    norm = nn.GroupNorm(2, 4).to(x.dtype)
    with fast_norms(norm, CUDA):
        result = norm(x)
    assert torch.equal(result, spread_group_norm(x, 2, norm.weight, norm.bias) if is_spread else norm(x))


def test_elsewhere_than_on_a_gpu_nothing_changes() -> None:
    norm, x = nn.GroupNorm(2, 4).bfloat16(), values(*LARGE).bfloat16()
    for device in (torch.device("cpu"), None):
        with fast_norms(norm, device):
            assert torch.equal(norm(x), functional.group_norm(x, 2, norm.weight, norm.bias))


RMS_NORMS = [WanRMS_norm, QwenImageRMS_norm, HunyuanVideo15RMS_norm, HunyuanImageRefinerRMS_norm]


def rms_norm(kind: Any, **options: Any) -> Any:
    norm = kind(6, **options).requires_grad_(False)
    for parameter in norm.parameters():
        parameter.copy_(values(*parameter.shape))
    return norm


@pytest.mark.parametrize("kind", RMS_NORMS)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 6, 3, 8, 8), {"images": False}),
        ((2, 6, 8, 8), {}),
        ((2, 6, 8, 8), {"bias": True}),
        ((2, 8, 6), {"channel_first": False}),
    ],
)
def test_norms_over_channels_are_what_diffusers_computes(
    kind: Any, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    norm, x = rms_norm(kind, **options), values(*shape)
    torch.testing.assert_close(fused_rms_norm(norm, x), norm(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(fused_rms_norm(norm, torch.zeros(shape)), norm(torch.zeros(shape)))


def test_norms_over_channels_are_fused_on_a_gpu_in_half_precision_alone() -> None:
    norm, x = rms_norm(WanRMS_norm).bfloat16(), values(1, 6, 16, 16)
    plain = norm.float()(x), norm.bfloat16()(x.bfloat16())
    with fast_norms(nn.Sequential(norm), CUDA):
        fused = norm(x.bfloat16())
        assert torch.equal(norm.float()(x), plain[0])
    assert torch.equal(fused, fused_rms_norm(norm.bfloat16(), x.bfloat16()))
    assert not torch.equal(fused, plain[1])
    assert torch.equal(norm(x.bfloat16()), plain[1])
