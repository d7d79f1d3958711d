"""Drawing with tensors: coordinates, coverage of signed distances, ridges of random knots.

Lengths are fractions of the picture's height; x grows to the right and y downwards. B rows are drawn at once.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Canvas:
    """The pixel centres of a picture: x (1, 1, 1, W) in [0, W / H], y (1, 1, H, 1) in [0, 1]."""

    height: int
    width: int
    device: torch.device

    @property
    def x(self) -> Tensor:
        return ((torch.arange(self.width, device=self.device) + 0.5) / self.height).view(1, 1, 1, -1)

    @property
    def y(self) -> Tensor:
        return ((torch.arange(self.height, device=self.device) + 0.5) / self.height).view(1, 1, -1, 1)

    @property
    def aspect(self) -> float:
        return self.width / self.height

    def cover(self, distance: Tensor, softness_px: float = 1.2) -> Tensor:
        """How much of each pixel lies inside, in [0, 1], for a signed distance that is negative inside."""
        return (0.5 - distance * self.height / softness_px).clamp(0, 1)


class Dice:
    """Hands out the columns of a (B, N) tensor of uniform numbers in [0, 1), each once, in order."""

    def __init__(self, rolls: Tensor):
        self.rolls = rolls
        self._used = 0

    def take(self, count: int) -> Tensor:
        """The next columns, (B, count)."""
        self._used += count
        assert self._used <= self.rolls.shape[1], "the rows hold too few dice"
        return self.rolls[:, self._used - count : self._used]

    def between(self, low: float, high: float) -> Tensor:
        """One number for each row in [low, high), (B, 1, 1, 1)."""
        return pixel(self.take(1)[:, 0] * (high - low) + low)


def pixel(values: Tensor) -> Tensor:
    """One number for each row, (B,), as (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def colour(rows: Tensor) -> Tensor:
    """Colours (B, 3) or one colour (3,) as (B or 1, 3, 1, 1)."""
    return rows.view(-1, 3, 1, 1)


def lerp(start: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    """`start` where the weight is 0, `end` where it is 1."""
    return start + (end - start) * weight


def ridge(knots: Tensor, x: Tensor, *, smooth: bool) -> Tensor:
    """Heights (B, 1, 1, W) through the knots (B, K), spread evenly over x (1, 1, 1, W) in [0, 1].

    :param smooth: round between the knots, otherwise straight.
    """
    u = x.flatten().clamp(0, 1) * (knots.shape[1] - 1)
    left = u.floor().clamp(max=knots.shape[1] - 2).long()
    part = u - left
    if smooth:
        part = part * part * (3 - 2 * part)
    heights = lerp(knots[:, left], knots[:, left + 1], part)
    return heights[:, None, None, :]


def rotate(dx: Tensor, dy: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """The offsets seen from a shape that is turned clockwise by `angle` (radians)."""
    cos, sin = angle.cos(), angle.sin()
    return dx * cos + dy * sin, dy * cos - dx * sin


def circle(dx: Tensor, dy: Tensor) -> Tensor:
    """Signed distance to the unit circle."""
    return (dx * dx + dy * dy).sqrt() - 1


def box(dx: Tensor, dy: Tensor, half_width: Tensor | float, half_height: Tensor | float) -> Tensor:
    """A bound of the signed distance to an upright rectangle, exact at its sides."""
    return torch.maximum(dx.abs() - half_width, dy.abs() - half_height)


def triangle(dx: Tensor, dy: Tensor, half_width: Tensor | float, half_height: Tensor | float) -> Tensor:
    """The same for an isosceles triangle that points up, centred between its tip and its base."""
    slope = half_width / (2 * half_height)
    side = (dx.abs() - (dy + half_height) * slope) / (1 + slope * slope) ** 0.5
    return torch.maximum(side, dy - half_height)


def star(dx: Tensor, dy: Tensor) -> Tensor:
    """Signed distance (to the lines of the edges) of a five-pointed star of radius 1 that points up."""
    angle = torch.remainder(torch.atan2(dx, -dy) + math.pi / 5, 2 * math.pi / 5) - math.pi / 5
    radius = (dx * dx + dy * dy).sqrt()
    along, across = radius * angle.cos(), radius * angle.abs().sin()
    # The edge runs from the tip (1, 0) to the notch at 36 degrees and radius 0.45.
    notch_x, notch_y = 0.45 * math.cos(math.pi / 5), 0.45 * math.sin(math.pi / 5)
    length = math.hypot(1 - notch_x, notch_y)
    return ((along - 1) * notch_y + across * (1 - notch_x)) / length


def heart(dx: Tensor, dy: Tensor) -> Tensor:
    """Signed distance of a heart of about unit radius: two discs over a corner.

    Source: Inigo Quilez, "2D distance functions", sdHeart, scaled to height 1.1 and centred.
    """
    scale = 1.75
    px, py = dx.abs() / scale, 0.55 - dy / scale
    top = ((px - 0.25) ** 2 + (py - 0.75) ** 2).sqrt() - math.sqrt(2) / 4
    corner = torch.minimum(
        (px**2 + (py - 1) ** 2).sqrt(),
        ((px - 0.5 * (px + py).clamp(min=0)) ** 2 + (py - 0.5 * (px + py).clamp(min=0)) ** 2).sqrt(),
    )
    lower = corner * torch.sign(px - py)
    return torch.where(px + py > 1, top, lower) * scale


def diamond(dx: Tensor, dy: Tensor) -> Tensor:
    """Signed distance (to the lines of the edges) of a diamond of height 2 and width 1.5."""
    return (dx.abs() / 0.75 + dy.abs() - 1) * 0.6
