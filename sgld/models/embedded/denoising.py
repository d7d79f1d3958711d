"""Trains a text encoder and a denoiser together by flow matching on latents that were encoded before."""

import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sgld.models.embedded.clock import Clock
from sgld.models.embedded.datasets import CAPTIONS_EACH, Bucket

PEAK_RATE = 1e-3
# The text encoder can read before (reading.py), and the first gradients of a new denoiser are noise to it.
TEXT_RATE = 2e-4
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
    optimizer, set_rate = _optimizer(text, denoiser)
    average = Average((text, denoiser))
    rng, mean_loss = random.Random(0), torch.zeros((), device=device)

    def step(bucket: Bucket) -> None:
        latents, tokens = _draw(bucket, batch_size, end_token)
        loss = _loss(text, denoiser, predict, latents, tokens)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        mean_loss.lerp_(loss.detach(), 0.01)

    set_rate(0.0)
    steps = [_captured(partial(step, bucket), device) for bucket in buckets]
    while not clock.is_over:
        set_rate(clock.rate())
        rng.choices(steps, weights=[bucket.weight for bucket in buckets])[0]()
        average.update()
        clock.step("denoiser loss", mean_loss.item)
    average.store()


def _optimizer(text: nn.Module, denoiser: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[float], None]]:
    """The optimizer of both, and what sets its rates to a fraction of their peaks."""
    device = next(denoiser.parameters()).device
    groups = [
        {"params": list(module.parameters()), "lr": torch.zeros((), device=device)} for module in (text, denoiser)
    ]
    is_captured = device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=1e-2, fused=True, capturable=is_captured)

    def set_rate(fraction: float) -> None:
        for group, peak in zip(optimizer.param_groups, (TEXT_RATE, PEAK_RATE), strict=True):
            group["lr"].fill_(peak * fraction)

    return optimizer, set_rate


def _captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The step as one CUDA graph, or as it is on another device.

    A step launches thousands of small kernels, which takes the CPU longer than it takes the GPU to run them: on an H200
    56 ms, 47 as a graph, and 24 as a graph of compiled blocks.
    """
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _draw(bucket: Bucket, batch_size: int, end_token: int) -> tuple[Tensor, Tensor]:
    """Random latents (float32) with one of their captions each, or with the empty prompt, which is the end token."""
    device = bucket.latents.device
    rows = torch.randint(len(bucket.latents), (batch_size,), device=device)
    which = torch.randint(CAPTIONS_EACH, (batch_size,), device=device)
    empty = torch.zeros_like(bucket.tokens[0, 0])
    empty[:1].fill_(end_token)
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
    # A block's code is compiled again for each shape; those of the video autoencoder have nine.
    torch._dynamo.config.recompile_limit = 32
    for block in blocks:
        block.compile(dynamic=False)
