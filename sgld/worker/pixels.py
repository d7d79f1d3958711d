"""From the pictures that pipelines return to frames: (F, H, W, 3), or 4 with alpha, on their device.

All pictures of a result belong to its one request: layers of a picture, views, maps.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sgld.errors import PipelineFailed

_CHANNELS = (1, 3, 4)
_KEPT_MODES = ("RGB", "RGBA", "L")
_ALPHA_MODES = ("LA", "PA", "La", "RGBa")
_DEPTH_MODES = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class Pixels:
    """Frames of a video, or pictures, (F, H, W, 3 or 4), uint8; with 16 bits (F, H, W, 6 or 8), the bytes of these."""

    frames: torch.Tensor
    is_video: bool


def pixels_of(value: Any, *, is_video: bool | None = None, is_map: bool = False, bit_depth: int = 8) -> Pixels | None:
    """The first sample of pictures or videos: tensors, arrays, Pillow's, and lists of these; None if it is neither.

    :param is_video: whether it is a video; None: its axes tell.
    :param is_map: measured rather than painted, as depth or normals: its values may need scaling to be seen.
    :param bit_depth: of each channel, 8 or 16.
    :raises PipelineFailed: the values don't have so many.
    """
    value = _as_tensor(value)
    if value is None or value.ndim not in (3, 4, 5):
        return None
    is_video = value.ndim == 5 if is_video is None else is_video
    frames = value[0] if value.ndim == 5 else value if value.ndim == 4 else value[None]
    if frames.shape[-1] not in _CHANNELS:
        if frames.shape[1] not in _CHANNELS:
            return None
        frames = frames.permute(0, 2, 3, 1)
    if frames.shape[-1] == 1:
        frames = frames.expand(-1, -1, -1, 3)
    frames = scaled(frames) if is_map else frames
    return Pixels(to_uint8(frames) if bit_depth == 8 else to_16_bits(frames), is_video)


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Frames in [0, 1] as uint8, rounded as diffusers does when it makes pictures."""
    if frames.dtype == torch.uint8:
        return frames
    if frames.ndim < 4:
        return (frames.float() * 255).round().clamp(0, 255).to(torch.uint8)
    made = torch.empty(frames.shape, dtype=torch.uint8, device=frames.device)
    # One by one: of a clip of 81 frames the numbers in between take a gigabyte, and three times as long.
    for own, frame in zip(made, frames, strict=True):
        own.copy_(to_uint8(frame))
    return made


def to_16_bits(frames: torch.Tensor) -> torch.Tensor:
    """Frames in [0, 1] with 16 bits for each channel: (F, H, W, C) as (F, H, W, 2 C), the bytes of uint16.

    :raises PipelineFailed: they come from values of 8 bits.
    """
    if frames.dtype in (torch.uint8, torch.bfloat16):
        name = str(frames.dtype).removeprefix("torch.")
        raise PipelineFailed(
            f"the pipeline returned pictures of 8 bits for each channel ({name}), so not of bit_depth 16"
        )
    levels = (frames.float() * 65535).round().clamp(0, 65535).to(torch.int32)
    # The same bits as uint16, for which torch has few operations.
    return levels.to(torch.int16).contiguous().view(torch.uint8)


def scaled(values: torch.Tensor) -> torch.Tensor:
    """Values in [0, 1]: those that are stay; those in [-1, 1] are halved and moved; others are spread over it."""
    if not values.is_floating_point():
        return values if values.dtype == torch.uint8 else scaled(values.float())
    values = values.nan_to_num()
    low, high = values.min(), values.max()
    if low >= 0 and high <= 1:
        return values
    if low >= -1 and high <= 1:
        return (values + 1) / 2
    return (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)


def _as_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value) if value.dtype.kind in "fiub" else None
    if hasattr(value, "convert"):  # a Pillow image
        return _from_pillow(value)
    if isinstance(value, list | tuple):
        parts = [part for item in value if (part := _as_tensor(item)) is not None]
        is_whole = parts and len(parts) == len(value) and len({part.shape for part in parts}) == 1
        return torch.stack(parts) if is_whole else None
    return None


def _from_pillow(image: Any) -> torch.Tensor:
    """(H, W, C)."""
    if image.mode in _DEPTH_MODES:
        return scaled(torch.from_numpy(np.array(image, np.float32)))[..., None]
    if image.mode not in _KEPT_MODES:
        image = image.convert("RGBA" if image.mode in _ALPHA_MODES or "transparency" in image.info else "RGB")
    pixels = torch.from_numpy(np.array(image))
    return pixels if pixels.ndim == 3 else pixels[..., None]
