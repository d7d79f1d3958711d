"""A pipeline without models, whose pictures and videos cost nothing; bench/delivery.py loads it as any model."""

from functools import cache
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from torch.nn import functional


class Still(BaseOutput):  # type: ignore[misc]
    """What `StillPipeline` returns: one of these."""

    images: Any = None
    frames: Any = None


class StillPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Shows `noise`, which nothing compresses, or `scene`, smooth shapes with the grain of a photograph."""

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str = "noise",
        num_frames: int = 1,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 1,
        output_type: str = "pt",
    ) -> Still:
        with self.progress_bar(total=num_inference_steps) as bar:
            bar.update()
        frames = shown(prompt, num_frames, height, width)
        return Still(images=frames) if num_frames == 1 else Still(frames=frames[None])


@cache
def shown(what: str, num_frames: int, height: int, width: int) -> torch.Tensor:
    """(F, 3, H, W), uint8; made once."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(num_frames, 3, height, width, generator=generator)
    if what == "noise":
        return (noise * 255).round().to(torch.uint8)
    coarse = torch.rand(num_frames, 3, height // 64 + 1, width // 64 + 1, generator=generator)
    shapes = functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return ((shapes * 0.9 + noise * 0.04) * 255).round().to(torch.uint8)
