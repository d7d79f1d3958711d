"""Training data on the device: pixels for the autoencoders; latents with several captions each for the denoisers."""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sgld.models.embedded.captions import MAX_TOKENS, build_tokenizer, caption
from sgld.models.embedded.scenes import draw_dice, draw_scenes, render_clips

CAPTIONS_EACH = 4
SCENES_PER_JOB = 4000


@dataclass(frozen=True)
class Captioned:
    """Scenes (N, fields) and their captions as tokens (N, CAPTIONS_EACH, MAX_TOKENS), 0 where there is none."""

    scenes: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Bucket:
    """Latents (N, C, ...) of one size, bfloat16, with their tokens, and how often a step draws from here."""

    latents: Tensor
    tokens: Tensor
    weight: float


def _write_captions(seed: int, moving: bool) -> tuple[np.ndarray, np.ndarray]:
    scenes = draw_scenes(SCENES_PER_JOB, seed, moving=moving)
    rng = random.Random(seed)
    texts = [caption(scene, rng) for scene in scenes for _ in range(CAPTIONS_EACH)]
    # One place stays free: the video model's padding needs at least one padded token.
    rows = build_tokenizer()(texts, truncation=True, max_length=MAX_TOKENS - 1)["input_ids"]
    tokens = np.zeros((len(rows), MAX_TOKENS), dtype=np.int16)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return np.array(scenes, dtype=np.uint8), tokens.reshape(-1, CAPTIONS_EACH, MAX_TOKENS)


class CaptionWriter:
    """Draws scenes and writes their captions in other processes, while the device trains the autoencoder."""

    def __init__(self, count: int, seed: int, *, moving: bool, num_workers: int):
        self._pool = ProcessPoolExecutor(num_workers)
        jobs = -(-count // SCENES_PER_JOB)
        self._jobs: list[Future[tuple[np.ndarray, np.ndarray]]] = [
            self._pool.submit(_write_captions, seed * 10_000 + job, moving) for job in range(jobs)
        ]

    def result(self) -> Captioned:
        scenes, tokens = zip(*(job.result() for job in self._jobs), strict=True)
        self._pool.shutdown()
        return Captioned(
            torch.from_numpy(np.concatenate(scenes)).long(), torch.from_numpy(np.concatenate(tokens)).int()
        )


@torch.no_grad()
def render_bytes(
    captioned_scenes: Tensor, generator: torch.Generator, *, num_frames: int, height: int, width: int
) -> Tensor:
    """uint8 clips (B, 3, num_frames, height, width) on the generator's device."""
    scenes = captioned_scenes.to(generator.device)
    clips = render_clips(scenes, draw_dice(len(scenes), generator), num_frames, height, width)
    return (clips * 255).round().to(torch.uint8)


def pixel_batches(pool: Tensor, batch_size: int, num_frames: int) -> Iterator[Tensor]:
    """Endless batches of windows of clips from a pool (N, 3, T, H, W); of one frame: pictures, (B, 3, H, W).

    Clips are cropped to half their size, four times as many, but for one batch in four: steps count more than
    pixels here.
    """
    height, width = pool.shape[-2:]
    for step in itertools.count():
        start = int(torch.randint(pool.shape[2] - num_frames + 1, ()).item())
        window = slice(start, start + num_frames)
        if num_frames == 1 or step % 4 == 0:
            rows = torch.randint(len(pool), (batch_size,), device=pool.device)
            batch = pool[rows, :, window]
        else:
            rows = torch.randint(len(pool), (4 * batch_size,), device=pool.device)
            top, left = (int(torch.randint(side // 2 + 1, ()).item()) for side in (height, width))
            batch = pool[rows, :, window, top : top + height // 2, left : left + width // 2]
        yield batch[:, :, 0] if num_frames == 1 else batch


@torch.no_grad()
def encode_bucket(
    encode: Callable[[Tensor], Tensor],
    captioned: Captioned,
    generator: torch.Generator,
    *,
    size: tuple[int, int, int],
    batch_size: int,
    weight: float,
    max_s: float,
) -> Bucket:
    """Renders and encodes scenes once, as many as there are or as fit into `max_s`.

    :param encode: uint8 clips (B, 3, T, H, W) to latents.
    :param size: frames, height and width.
    """
    start, latents, used = time.monotonic(), [], 0
    while used < len(captioned.scenes) and time.monotonic() - start < max_s:
        scenes = captioned.scenes[used : used + batch_size]
        clips = render_bytes(scenes, generator, num_frames=size[0], height=size[1], width=size[2])
        latents.append(encode(clips).bfloat16())
        used += len(scenes)
    tokens = captioned.tokens[:used].to(generator.device)
    print(f"encoded {used} of {size} in {time.monotonic() - start:.0f} s", flush=True)
    return Bucket(torch.cat(latents), tokens, weight)
