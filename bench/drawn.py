"""A pipeline without models, whose pictures and videos are drawn; benches load it as any model."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from torch.nn import functional

MOTIONS = ("pan", "zoom", "rotate", "textures", "shapes")
# Centre, way in a frame at a speed of 1, radius, colour; as parts of the height.
_DISCS = (
    ((0.31, 0.23), (1.0, 0.3), 0.135, (0.9, 0.2, 0.1)),
    ((0.63, 0.62), (-0.8, 0.4), 0.177, (0.1, 0.7, 0.3)),
    ((0.26, 0.78), (0.2, 1.0), 0.094, (0.2, 0.3, 0.9)),
)


class Drawn(BaseOutput):  # type: ignore[misc]
    """What `DrawnPipeline` returns: one of these."""

    images: Any = None
    frames: Any = None


class DrawnPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws what its prompt names: one of MOTIONS, `speed` pixels a frame, or what `still` knows."""

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
        speed: float = 4.0,
        output_type: str = "pt",
    ) -> Drawn:
        with self.progress_bar(total=num_inference_steps) as bar:
            bar.update()
        if prompt in MOTIONS:
            frames = torch.empty(num_frames, 3, height, width, dtype=torch.uint8)
            for index in range(num_frames):
                frames[index] = to_bytes(frame_at(prompt, index, height=height, width=width, speed=speed)[0])
        else:
            frames = still(prompt, num_frames, height, width)
        return Drawn(images=frames) if num_frames == 1 else Drawn(frames=frames[None])


def save(folder: Path) -> None:
    """The pipeline as a model in a folder, with its code."""
    (folder / "pipeline.py").write_text(Path(__file__).read_text())
    DrawnPipeline(FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)


def to_bytes(picture: torch.Tensor) -> torch.Tensor:
    """From [0, 1] to uint8."""
    return (picture * 255).round().to(torch.uint8)


@cache
def still(what: str, num_frames: int, height: int, width: int) -> torch.Tensor:
    """(F, 3, H, W), uint8, made once.

    :param what: `noise`, which nothing compresses; else smooth shapes with the grain of a photograph.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(num_frames, 3, height, width, generator=generator)
    if what == "noise":
        return to_bytes(noise)
    coarse = torch.rand(num_frames, 3, height // 64 + 1, width // 64 + 1, generator=generator)
    shapes = functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return to_bytes(shapes * 0.9 + noise * 0.04)


def frame_at(motion: str, time: float, *, height: int, width: int, speed: float) -> torch.Tensor:
    """One frame of a motion at a time in frames, (1, 3, H, W) in [0, 1].

    Textures pan, zoom or turn as a whole; discs of texture or of one colour pass over a still ground.
    """
    x, y = _grid(height, width)
    ground = _texture(height, width, 1)
    if motion == "pan":
        return _read(ground, x + speed * time, y + 0.5 * speed * time)
    middle_x, middle_y = x - width / 2, y - height / 2
    if motion == "zoom":
        factor = 1 - 2 * speed * time / width
        return _read(ground, middle_x * factor + width / 2, middle_y * factor + height / 2)
    if motion == "rotate":
        cos, sin = math.cos(2 * speed * time / width), math.sin(2 * speed * time / width)
        return _read(ground, cos * middle_x - sin * middle_y + width / 2, sin * middle_x + cos * middle_y + height / 2)
    frame = _read(ground, x, y) if motion == "textures" else torch.full((1, 3, height, width), 0.5)
    texture = _texture(height, width, 2)
    for (start_y, start_x), (way_x, way_y), radius, colour in _DISCS:
        at_x, at_y = start_x * width + way_x * speed * time, start_y * height + way_y * speed * time
        inside = (radius * height - torch.hypot(x - at_x, y - at_y)).clamp(-0.5, 0.5) + 0.5
        moving = _read(texture, x - at_x + width / 2, y - at_y + height / 2)
        disc = moving if motion == "textures" else torch.tensor(colour).view(1, 3, 1, 1)
        frame = frame * (1 - inside) + disc * inside
    return frame


def _grid(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    return x, y


def _texture(height: int, width: int, seed: int) -> torch.Tensor:
    """Smooth noise of three sizes, with a margin of a quarter."""
    generator = torch.Generator().manual_seed(seed)
    size = (height + height // 2, width + width // 2)
    layers = []
    for period, weight in ((4, 0.5), (8, 1.0), (16, 1.0)):
        noise = torch.rand(1, 3, size[0] // period + 3, size[1] // period + 3, generator=generator)
        layers.append(weight * functional.interpolate(noise, size, mode="bicubic"))
    total = torch.stack(layers).sum(0)
    return (total - total.min()) / (total.max() - total.min())


def _read(texture: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    height, width = texture.shape[2:]
    x, y = x + width / 6, y + height / 6
    grid = torch.stack((2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1), -1)[None]
    read = functional.grid_sample(texture, grid, mode="bicubic", padding_mode="reflection", align_corners=True)
    return read.clamp(0, 1)
