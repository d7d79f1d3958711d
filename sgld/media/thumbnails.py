"""Small pictures of videos."""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_THUMBNAIL_SIDE = 512
_CELL_SIDE = 160
_COLUMNS, _ROWS = 4, 4


def small(frame: NDArray[np.uint8]) -> bytes:
    """A frame (H, W, 3 or 4) as a small WebP."""
    buffer = BytesIO()
    _shrunk(frame, _THUMBNAIL_SIDE).save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def spritesheet(frames: NDArray[np.uint8]) -> bytes:
    """Up to 16 frames at even distances, in rows of four, as JPEG."""
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), _COLUMNS * _ROWS)).round().astype(int)
    cells = [_shrunk(frames[index], _CELL_SIDE) for index in chosen]
    width, height = cells[0].size
    sheet = Image.new("RGB", (min(len(cells), _COLUMNS) * width, -(-len(cells) // _COLUMNS) * height))
    for number, cell in enumerate(cells):
        sheet.paste(cell, (number % _COLUMNS * width, number // _COLUMNS * height))
    buffer = BytesIO()
    sheet.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _shrunk(frame: NDArray[np.uint8], side: int) -> Image.Image:
    image = Image.fromarray(frame).convert("RGB")
    image.thumbnail((side, side))
    return image
