"""Trains the autoencoders of the embedded models and gives their latents mean 0 and deviation 1."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sgld.models.embedded.clock import Clock

# AutoencoderKL or AutoencoderKLWan, which diffusers doesn't type.
AutoencoderLike = Any
# Small enough to cost no sharpness, large enough that neighbouring latents decode to neighbouring pictures.
KL_WEIGHT = 1e-4
PEAK_RATE = 1e-3


def train_autoencoder(vae: AutoencoderLike, batches: Iterator[Tensor], clock: Clock, device: str) -> None:
    """Trains until the clock says so.

    :param batches: uint8 pictures (B, 3, H, W) or clips (B, 3, T, H, W).
    """
    vae.to(device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=1e-3)
    while not clock.is_over:
        _set_rate(optimizer, PEAK_RATE * clock.rate())
        pixels = next(batches).to(device).float() / 127.5 - 1
        with torch.autocast(device, torch.bfloat16):
            loss, error = _loss(vae, pixels)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        clock.step("autoencoder squared error", error.item)
    vae.eval()


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _loss(vae: AutoencoderLike, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """L1 on pixels and on their differences, which keeps edges sharp; also the squared error."""
    posterior = vae.encode(pixels).latent_dist
    decoded = _decode_unclamped(vae, posterior.sample()).float()
    wrong = decoded - pixels
    edges = sum(wrong.diff(dim=dim).abs().mean() for dim in range(2, pixels.ndim))
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    error = (wrong.detach() ** 2).mean()
    return wrong.abs().mean() + edges + 2 * (wrong**2).mean() + KL_WEIGHT * kl, error


def _decode_unclamped(vae: AutoencoderLike, latents: Tensor) -> Tensor:
    """Wan's decoder clamps, which only cuts gradients where the picture is already at its limit."""
    decoded: Tensor = vae.decode(latents, return_dict=False)[0]
    return decoded


@torch.no_grad()
def normalise_latents(vae: AutoencoderLike, encode: Callable[[], Tensor]) -> None:
    """Folds the mean and deviation of each latent channel into the autoencoder's 1x1 convolutions.

    :param encode: gives latents (B, C, ...) of the present autoencoder.
    """
    latents = encode().float()
    over = [dim for dim in range(latents.ndim) if dim != 1]
    mean, deviation = latents.mean(over), latents.std(over)
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    tail = (1,) * (quant.weight.ndim - 1)
    # mean' = (mean - m) / s, and the deviation shrinks alike; then z = s z' + m before decoding.
    quant.weight[:channels] /= deviation.view(-1, *tail)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / deviation
    quant.bias[channels:] -= 2 * deviation.log()
    post.bias += (post.weight * mean.view(1, -1, *tail[1:])).flatten(1).sum(1)
    post.weight *= deviation.view(1, -1, *tail[1:])
