"""What a pipeline returned, as far as a client can be given it: pictures, videos and sound."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sgld.errors import PipelineFailed
from sgld.worker.pixels import Pixels, pixels_of

# The names of fields in all results of diffusers' pipelines, and in the states of its modular ones.
_VIDEOS = ("frames", "videos", "video")
_PICTURES = ("images", "image")
_MAPS = ("prediction",)
_SOUNDS = ("audio", "audios")
# Where the sample rate is, the last to touch the sound first; the pipeline itself stands for ''.
_RATE_HOLDERS = ("vocoder", "", "audio_vae", "vae")
_RATE_NAMES = ("output_sampling_rate", "sampling_rate", "sample_rate")


@dataclass(frozen=True)
class Outputs:
    """Pictures or frames, and sound of (channels, samples) in float32; one of them is there."""

    pixels: Pixels | None
    audio: NDArray[np.float32] | None


def outputs_of(result: Any, bit_depth: int = 8) -> Outputs:
    """The first sample of a pipeline's result.

    :param bit_depth: of each channel of pictures, 8 or 16.
    :raises PipelineFailed: it holds nothing that can be shown or heard, or pictures of fewer bits.
    """
    fields = _fields(result)
    outputs = Outputs(
        _pixels(fields, bit_depth), _audio(next((fields[name] for name in _SOUNDS if name in fields), None))
    )
    if outputs.pixels is None and outputs.audio is None:
        named = f"it holds {', '.join(map(str, fields))}" if fields else f"it is a {type(result).__name__}"
        raise PipelineFailed(f"the pipeline returned neither pictures nor sound: {named}")
    return outputs


def sample_rate_of(pipeline: Any) -> int | None:
    """Samples per second of the sound that a pipeline makes, as it or its models tell."""
    for holder in _RATE_HOLDERS:
        owner = getattr(pipeline, holder, None) if holder else pipeline
        for place in (getattr(owner, "config", None), owner):
            for name in _RATE_NAMES:
                rate = getattr(place, name, None)
                if isinstance(rate, int | float) and rate > 0:
                    return int(rate)
    return None


def _fields(result: Any) -> dict[str, Any]:
    """The parts of a result by their names; what has none is named after what it looks like."""
    if isinstance(result, Mapping):
        found = dict(result)
    elif isinstance(values := getattr(result, "values", None), dict):  # the state of a modular pipeline
        found = values
    elif isinstance(result, torch.Tensor | np.ndarray | list) or hasattr(result, "convert"):
        found = {"": result}
    elif isinstance(result, tuple):
        found = {"": result[0]} if result else {}
    else:
        found = dict(vars(result)) if hasattr(result, "__dict__") else {}
    return {name: value for name, value in found.items() if value is not None}


def _pixels(fields: Mapping[str, Any], bit_depth: int) -> Pixels | None:
    for names, choices in (
        (_VIDEOS, {"is_video": True}),
        (_PICTURES, {"is_video": False}),
        (_MAPS, {"is_video": False, "is_map": True}),
        (("",), {}),
    ):
        for name in names:
            pixels = pixels_of(fields.get(name), bit_depth=bit_depth, **choices)
            if pixels is not None and len(pixels.frames):
                return pixels
    return None


def _audio(value: Any) -> NDArray[np.float32] | None:
    """Sound of one sample, (channels, samples), from (samples,), (B, samples) or (B, channels, samples)."""
    if isinstance(value, list | tuple) and value:
        value = value[0][None] if hasattr(value[0], "ndim") else None
    if isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().numpy()
    if not isinstance(value, np.ndarray) or value.ndim not in (1, 2, 3) or value.dtype.kind != "f" or not value.size:
        return None
    sound = value[None] if value.ndim == 1 else value[:1] if value.ndim == 2 else value[0]
    return np.ascontiguousarray(np.nan_to_num(sound), np.float32)
