"""Short videos as animated pictures: GIF and WebP, without sound."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, assert_never

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sgld.errors import InvalidRequest
from sgld.media.files import write_atomically
from sgld.media.metadata import exif_block, to_json

# Pillow keeps a byte for each pixel of a GIF until it has seen them all.
MAX_GIF_PIXELS = 2**30
AnimationFormat = Literal["gif", "webp"]
# GIF counts in hundredths of a second, and browsers slow down frames of less than two.
_TICKS_PER_S: dict[AnimationFormat, int] = {"gif": 100, "webp": 1000}
_MAX_FPS: dict[AnimationFormat, float] = {"gif": 50.0, "webp": 100.0}


def write_animation(
    path: Path,
    frames: NDArray[np.uint8],
    animation_format: AnimationFormat,
    *,
    fps: float,
    quality: int = 90,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write an animated picture, atomically; it repeats for ever. Frames that are equal to the one before are joined.

    :param frames: (F, H, W, 3), uint8, RGB, or 4 channels, whose alpha is dropped.
    :param quality: 1 to 100, of WebP; GIF has 256 colours for each frame, whatever it is.
    :param metadata: the parameters to write into it, see `sgld.media.metadata`.
    :raises ValueError: the frames have another shape or dtype, or there are none.
    :raises OSError: the file can't be written; nothing of it is left.
    :raises InvalidRequest: the rate is more than such pictures have, or the format has none of this size or length.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] not in (3, 4) or 0 in frames.shape:
        raise ValueError(f"a video is (F, H, W, 3) of uint8 or has 4 channels, got {frames.shape} of {frames.dtype}")
    check_rate(animation_format, fps)
    durations = durations_ms(len(frames), fps, _TICKS_PER_S[animation_format])
    about: dict[str, Any] = {"save_all": True, "duration": durations, "loop": 0}
    match animation_format:
        case "gif":
            _check_gif(frames)
            about |= {"comment": b"" if metadata is None else to_json(metadata).encode()}
        case "webp":
            about |= {"quality": quality, "exif": b"" if metadata is None else exif_block(metadata)}
        case _:
            assert_never(animation_format)
    write_atomically(path, lambda temporary: _save(_Frames(frames), temporary, animation_format, about))


def check_rate(animation_format: AnimationFormat, fps: float) -> None:
    """See that such pictures can be as fast.

    :raises InvalidRequest: they can't.
    """
    if not 0 < fps <= _MAX_FPS[animation_format]:
        most = _MAX_FPS[animation_format]
        raise InvalidRequest(f"a {animation_format} has at most {most:g} frames per second, not {fps:g}", "fps")


class _Frames(Image.Image):
    """All frames as one picture for Pillow, which sees one at a time: no other is in its memory."""

    def __init__(self, frames: NDArray[np.uint8]) -> None:
        super().__init__()
        self.n_frames = len(frames)
        self._frames = frames
        self.seek(0)

    def seek(self, frame: int) -> None:
        if not 0 <= frame < self.n_frames:
            raise EOFError(f"there is no frame {frame}")
        image = Image.fromarray(np.ascontiguousarray(self._frames[frame, ..., :3]))
        self.im, self._mode, self._size, self._index = image.im, image.mode, image.size, frame

    def tell(self) -> int:
        return self._index


def _check_gif(frames: NDArray[np.uint8]) -> None:
    num_frames, height, width, _ = frames.shape
    if num_frames * height * width > MAX_GIF_PIXELS:
        most = MAX_GIF_PIXELS // (height * width)
        raise InvalidRequest(
            f"a gif of {width}x{height} has at most {most} frames here, not {num_frames}; choose webp or mp4",
            "output_format",
        )


def durations_ms(num_frames: int, fps: float, ticks_per_s: int) -> list[int]:
    """How long each frame is shown: in ticks of the format, so that no error adds up."""
    ends = [round(index * ticks_per_s / fps) for index in range(num_frames + 1)]
    return [(end - start) * 1000 // ticks_per_s for start, end in pairwise(ends)]


def _save(image: Image.Image, path: Path, animation_format: AnimationFormat, about: Mapping[str, Any]) -> None:
    try:
        image.save(path, animation_format.upper(), **about)
    except (ValueError, RuntimeError) as error:  # Pillow's WebP raises the latter
        message = f"a video of {image.width}x{image.height} can't be written as {animation_format}: {error}"
        raise InvalidRequest(message) from error
