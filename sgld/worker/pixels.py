"""From what a pipeline returns to frames: uint8, RGB, (F, H, W, 3), on the device where it was."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sgld.errors import PipelineFailed


@dataclass(frozen=True)
class Pixels:
    """Frames, (F, H, W, 3), uint8; a picture has one."""

    frames: torch.Tensor
    is_video: bool


def pixels_of(result: Any) -> Pixels:
    """The frames of the first sample of a pipeline's result.

    :raises PipelineFailed: it holds no pictures.
    """
    value = getattr(result, "images", None)
    if value is None:
        value = getattr(result, "frames", None)
    if value is None and isinstance(result, tuple) and result:
        value = result[0]
    value = _as_tensor(value)
    if value is None or value.ndim not in (4, 5) or 3 not in (value.shape[-3], value.shape[-1]):
        raise PipelineFailed(f"the pipeline returned a {type(result).__name__} without RGB pictures")
    is_video = value.ndim == 5
    frames = value[0] if is_video else value[:1]
    if frames.shape[-1] != 3:
        frames = frames.permute(0, 2, 3, 1)
    return Pixels(to_uint8(frames), is_video)


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Frames in [0, 1] as uint8, rounded as diffusers does when it makes pictures."""
    if frames.dtype == torch.uint8:
        return frames
    return (frames.float() * 255).round().clamp(0, 255).to(torch.uint8)


def _as_tensor(value: Any) -> torch.Tensor | None:
    """A tensor from what pipelines return: tensors, arrays, pictures, and lists of these."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if hasattr(value, "convert"):  # a PIL image
        return torch.from_numpy(np.array(value.convert("RGB")))
    if isinstance(value, list | tuple):
        parts = [_as_tensor(part) for part in value]
        tensors = [part for part in parts if part is not None]
        return torch.stack(tensors) if tensors and len(tensors) == len(parts) else None
    return None
