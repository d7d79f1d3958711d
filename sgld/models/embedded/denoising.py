"""Trains a text encoder and a denoiser together by flow matching on latents that were encoded before."""

import random
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from sgld.models.embedded.clock import Clock
from sgld.models.embedded.datasets import CAPTIONS_EACH, Bucket

PEAK_RATE = 1e-3
EMA_DECAY = 0.9995
EMPTY_PROMPTS = 0.1

# (text encoder, denoiser, noisy latents, timestep in [0, 1000], tokens) to the predicted velocity.
Predict = Callable[[nn.Module, nn.Module, Tensor, Tensor, Tensor], Tensor]


class Average:
    """An exponential moving average of parameters (EMA), in float32."""

    def __init__(self, modules: Sequence[nn.Module]):
        self._live: list[Tensor] = [parameter for module in modules for parameter in module.parameters()]
        self._kept = [parameter.detach().clone() for parameter in self._live]
        self._num_steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """One step; the average is short at first, so that the start is forgotten."""
        self._num_steps += 1
        decay = min(EMA_DECAY, (1 + self._num_steps) / (10 + self._num_steps))
        torch._foreach_lerp_(self._kept, self._live, 1 - decay)

    @torch.no_grad()
    def store(self) -> None:
        """Puts the average into the modules."""
        torch._foreach_copy_(self._live, self._kept)


def train_denoiser(
    text: nn.Module,
    denoiser: nn.Module,
    predict: Predict,
    buckets: Sequence[Bucket],
    *,
    batch_size: int,
    end_token: int,
    clock: Clock,
) -> None:
    """Trains both modules until the clock says so and leaves the averaged weights in them."""
    device = next(denoiser.parameters()).device
    parameters = [*text.parameters(), *denoiser.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    average = Average((text, denoiser))
    rng, mean_loss = random.Random(0), torch.zeros((), device=device)
    while not clock.is_over:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * clock.rate()
        bucket = rng.choices(buckets, weights=[bucket.weight for bucket in buckets])[0]
        latents, tokens = _draw(bucket, batch_size, end_token)
        loss = _loss(text, denoiser, predict, latents, tokens)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        mean_loss = torch.lerp(mean_loss, loss.detach(), 0.01)
        clock.step("denoiser loss", mean_loss.item)
    average.store()


def _draw(bucket: Bucket, batch_size: int, end_token: int) -> tuple[Tensor, Tensor]:
    """Random latents (float32) with one of their captions each, or with the empty prompt, which is the end token."""
    device = bucket.latents.device
    rows = torch.randint(len(bucket.latents), (batch_size,), device=device)
    which = torch.randint(CAPTIONS_EACH, (batch_size,), device=device)
    empty = torch.zeros_like(bucket.tokens[0, 0])
    empty[0] = end_token
    is_empty = torch.rand(batch_size, 1, device=device) < EMPTY_PROMPTS
    return bucket.latents[rows].float(), torch.where(is_empty, empty, bucket.tokens[rows, which])


def _loss(text: nn.Module, denoiser: nn.Module, predict: Predict, latents: Tensor, tokens: Tensor) -> Tensor:
    """Squared error of the velocity, noise minus data, at logit-normal times.

    Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", sections 2 and 3.1.
    """
    noise = torch.randn_like(latents)
    time = torch.sigmoid(0.3 + 1.1 * torch.randn(len(latents), device=latents.device))
    sigma = time.view(-1, *(1,) * (latents.ndim - 1))
    with torch.autocast(latents.device.type, torch.bfloat16):
        velocity = predict(text, denoiser, (1 - sigma) * latents + sigma * noise, time * 1000, tokens)
    return (velocity.float() - (noise - latents)).square().mean()


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles one block for all: they share their code, so that the first one's compilation serves the others."""
    for block in blocks:
        block.compile(dynamic=False)
