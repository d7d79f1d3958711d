"""Measures the embedded models: do pictures of held-out prompts show what the prompts ask for?"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sgld.models.embedded.attributes import Scene
from sgld.models.embedded.captions import caption
from sgld.models.embedded.checker import agreement, agreement_of_clip
from sgld.models.embedded.scenes import draw_dice, draw_scenes, render, render_clips

_BATCH_SIZE = 16


@dataclass
class Score:
    """For each attribute, in how many pictures it was asked for and in how many it was right."""

    asked: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)

    def add(self, seen: dict[str, bool]) -> None:
        self.asked.update(seen.keys())
        self.right.update(name for name, is_right in seen.items() if is_right)

    def rate(self, name: str) -> float:
        return self.right[name] / self.asked[name]


def held_out_prompts(count: int, seed: int, *, moving: bool = False) -> tuple[list[Scene], list[str]]:
    """Scenes whose combination of attributes training never draws, and a plain caption of each."""
    scenes = draw_scenes(count, seed, held_out=True, moving=moving)
    rng = random.Random(seed)
    return scenes, [caption(scene, rng, plain=True) for scene in scenes]


@torch.no_grad()
def generate_pixels(pipeline: Any, prompts: Sequence[str], seed: int, options: dict[str, Any]) -> torch.Tensor:
    """Pictures (B, 3, H, W), or clips (B, T, 3, H, W), in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    out = pipeline(list(prompts), generator=generator, output_type="pt", **options)
    pixels: torch.Tensor = out.frames if hasattr(out, "frames") else out.images
    return pixels.float().cpu()


def score(pipeline: Any, scenes: Sequence[Scene], prompts: Sequence[str], options: dict[str, Any]) -> Score:
    """Generates one picture or clip for each prompt and checks it against its scene."""
    total = Score()
    for start in range(0, len(prompts), _BATCH_SIZE):
        rows = slice(start, start + _BATCH_SIZE)
        pixels = generate_pixels(pipeline, prompts[rows], start, options)
        look = agreement_of_clip if pixels.ndim == 5 else agreement
        for scene, one in zip(scenes[rows], pixels, strict=True):
            total.add(look(scene, one))
    return total


@torch.no_grad()
def autoencoder_psnr(vae: Any, scenes: Sequence[Scene], size: tuple[int, int, int]) -> float:
    """Decibels between drawn scenes of `size` (frames, height, width) and what the autoencoder makes of them."""
    dice = draw_dice(len(scenes), torch.Generator().manual_seed(0))
    rows = torch.tensor(scenes)
    if size[0] == 1:
        pixels = render(rows, dice, size[1], size[2])
    else:
        pixels = render_clips(rows, dice, *size)
    decoded = vae.decode(vae.encode(pixels * 2 - 1).latent_dist.mean, return_dict=False)[0] / 2 + 0.5
    return float(-10 * (decoded.clamp(0, 1) - pixels).square().mean().log10())
