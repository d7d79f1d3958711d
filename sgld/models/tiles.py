"""A picture in tiles that overlap, and its larger picture put together of theirs without a seam."""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

# Of the overlap, beyond what the border of a tile spoils: there one tile fades into the next.
FADE = 16


@dataclass(frozen=True)
class Span:
    """Pixels `start` to `stop` of a side."""

    start: int
    stop: int


def overlap_of(radius: int, multiple: int = 1) -> int:
    """How many pixels two tiles side by side share."""
    return 2 * radius + FADE + multiple


def spans(length: int, edge: int, radius: int, multiple: int = 1) -> tuple[Span, ...]:
    """A side in spans of at most `edge` pixels that overlap by what they spoil and fade; one if it isn't longer.

    :param radius: so many pixels at the end of a span that isn't the end of the side are spoilt.
    :param multiple: starts are multiples of it.
    """
    overlap = overlap_of(radius, multiple)
    if length <= edge:
        return (Span(0, length),)
    count = math.ceil((length - overlap) / max(edge - overlap, multiple))
    starts = [round(index * (length - edge) / (count - 1) / multiple) * multiple for index in range(count)]
    return (*(Span(start, start + edge) for start in starts[:-1]), Span(starts[-1], length))


def weights(parts: tuple[Span, ...], length: int, radius: int, scale: int) -> list[torch.Tensor]:
    """How much each span counts at each of its pixels once they are `scale` times as many; they add up to 1."""
    raw = []
    for part in parts:
        pixels = torch.arange((part.stop - part.start) * scale, dtype=torch.float32)
        rising = pixels + 1 - radius * scale if part.start else torch.full_like(pixels, torch.inf)
        falling = pixels.flip(0) + 1 - radius * scale if part.stop < length else torch.full_like(pixels, torch.inf)
        raw.append(torch.minimum(rising, falling).clamp(0, FADE * scale))
    total = torch.zeros(length * scale)
    for part, weight in zip(parts, raw, strict=True):
        total[part.start * scale : part.stop * scale] += weight
    return [weight / total[part.start * scale : part.stop * scale] for part, weight in zip(parts, raw, strict=True)]


class Canvas:
    """The larger picture of one picture: tiles are added, each once, and the last one makes it whole.

    :param height: and `width` of the picture.
    :param scale: of the tiles' results.
    :param size: of the picture that comes out, where that isn't `scale` times the picture's.
    """

    def __init__(
        self, height: int, width: int, *, edge: int, radius: int, multiple: int, scale: int, size: tuple[int, int]
    ) -> None:
        self._scale = scale
        self._size = size
        rows, columns = spans(height, edge, radius, multiple), spans(width, edge, radius, multiple)
        row_weights, column_weights = weights(rows, height, radius, scale), weights(columns, width, radius, scale)
        self.tiles = [(row, column) for row in rows for column in columns]
        self._weights = [(row, column) for row in row_weights for column in column_weights]
        self._shape = height * scale, width * scale
        self._sum: torch.Tensor | None = None
        self._num_added = 0

    def add(self, index: int, result: torch.Tensor) -> torch.Tensor | None:
        """Add what came of tile `index`, (1, C, H, W) in [0, 1]; with the last one, the whole picture.

        :return: (1, H, W, C), uint8.
        """
        self._num_added += 1
        if len(self.tiles) == 1:
            return self._finished(result)
        if self._sum is None:
            self._sum = result.new_zeros(result.shape[:2] + self._shape, dtype=torch.float32)
        row, column = self.tiles[index]
        down, across = (weight.to(result.device) for weight in self._weights[index])
        place = self._sum[
            :,
            :,
            row.start * self._scale : row.stop * self._scale,
            column.start * self._scale : column.stop * self._scale,
        ]
        place += result.float() * down[:, None] * across
        return self._finished(self._sum) if self._num_added == len(self.tiles) else None

    def _finished(self, result: torch.Tensor) -> torch.Tensor:
        if result.shape[2:] != self._size:
            result = functional.interpolate(result.float(), self._size, mode="bicubic", antialias=True)
        return (result * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
