"""Draws arrangements of coloured shapes on a plain background, still or moving."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sgld.models.embedded import attributes as attr
from sgld.models.embedded import drawing
from sgld.models.embedded.drawing import Canvas, Dice, pixel

# sRGB in [0, 1], in the order of attributes.COLOURS.
COLOUR_VALUES = (
    (0.88, 0.13, 0.13),
    (0.98, 0.55, 0.08),
    (0.98, 0.86, 0.12),
    (0.13, 0.64, 0.24),
    (0.12, 0.80, 0.86),
    (0.12, 0.30, 0.88),
    (0.50, 0.16, 0.68),
    (0.98, 0.55, 0.74),
    (0.98, 0.98, 0.98),
    (0.04, 0.04, 0.05),
    (0.52, 0.52, 0.54),
)
# Radius of one shape by size, as a fraction of the shorter side, and of each of several.
RADIUS_ALONE = (0.10, 0.18, 0.28)
RADIUS_SEVERAL = (0.065, 0.100, 0.132)
# Two sides (radius 1 across the corners would make it look small), chosen so that all shapes seem of one size.
SQUARE_HALF = 0.88
SPOT_RADIUS = 0.22


@dataclass(frozen=True)
class Shapes:
    """Up to MAX_NUMBER shapes in each of B rows; positions are fractions of width and height.

    x, y, radius, angle: (B, MAX_NUMBER) float, radius 0 where there is no shape; kind, colour: (B, MAX_NUMBER) int;
    spot: (B,) float, 1 where the shape carries a spot that shows its rotation.
    """

    x: Tensor
    y: Tensor
    radius: Tensor
    angle: Tensor
    kind: Tensor
    colour: Tensor
    spot: Tensor


def render_shapes(scenes: Tensor, dice: Dice, canvas: Canvas, time: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] of scenes (B, fields of Scene), at `time` (B,): 0 is the start, 1 the end."""
    values = torch.tensor(COLOUR_VALUES, device=scenes.device)
    jitter = (dice.take(6) - 0.5).view(-1, 2, 3, 1, 1) * 0.05
    shapes = _place(scenes, dice, time)
    picture = (drawing.colour(values[_field(scenes, "background")]) + jitter[:, 0]).clamp(0, 1)
    picture = picture.expand(-1, 3, canvas.height, canvas.width)
    short = min(1.0, canvas.aspect)
    for slot in range(attr.MAX_NUMBER):
        radius = pixel(shapes.radius[:, slot]) * short
        safe = radius.clamp(min=1e-3)
        dx = (canvas.x - pixel(shapes.x[:, slot]) * canvas.aspect) / safe
        dy = (canvas.y - pixel(shapes.y[:, slot])) / safe
        dx, dy = drawing.rotate(dx, dy, pixel(shapes.angle[:, slot]))
        cover = canvas.cover(distance(shapes.kind[:, slot], dx, dy) * safe) * (radius > 0)
        paint = (drawing.colour(values[shapes.colour[:, slot]]) + jitter[:, 1]).clamp(0, 1)
        picture = drawing.lerp(picture, paint, cover)
        if slot == 0:
            spot = canvas.cover((drawing.circle(dx / SPOT_RADIUS, (dy + 0.5) / SPOT_RADIUS)) * SPOT_RADIUS * safe)
            # A spot in the background's colour: the shape keeps the one colour of its caption.
            hole = drawing.colour(values[_field(scenes, "background")]) + jitter[:, 0]
            picture = drawing.lerp(picture, hole.clamp(0, 1), spot * pixel(shapes.spot))
    return picture


def _field(scenes: Tensor, name: str) -> Tensor:
    return scenes[:, attr.Scene._fields.index(name)]


def distance(kind: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Signed distances (B, 1, H, W) in units of the radius, of the shape that each row's `kind` (B,) names."""
    each = (
        drawing.circle(dx, dy),
        drawing.box(dx, dy, SQUARE_HALF, SQUARE_HALF),
        drawing.triangle(dx, dy, 1.0, 0.88),
        drawing.star(dx / 1.15, dy / 1.15) * 1.15,
        drawing.heart(dx, dy),
        drawing.diamond(dx / 1.12, dy / 1.12) * 1.12,
    )
    distance = each[0]
    for index, candidate in enumerate(each[1:], start=1):
        distance = torch.where(pixel(kind) == index, candidate, distance)
    return distance


def _place(scenes: Tensor, dice: Dice, time: Tensor) -> Shapes:
    number, pair = _field(scenes, "number"), _field(scenes, "kind") == attr.PAIR
    device, slots = scenes.device, torch.arange(attr.MAX_NUMBER, device=scenes.device)
    size = _field(scenes, "size")
    wobble = 1 + 0.16 * (dice.take(1) - 0.5)
    alone = torch.tensor(RADIUS_ALONE, device=device)[size][:, None] * wobble
    several = torch.tensor(RADIUS_SEVERAL, device=device)[size][:, None] * wobble
    radius = torch.where((number == 1)[:, None], alone, several)
    radius = torch.where(pair[:, None], 0.155 * wobble, radius)
    count = torch.where(pair, 2, number)
    radius = radius * (slots < count[:, None])
    # In a row each has 1 / number of the width.
    in_row = ((number > 1) & (_field(scenes, "position") == 1))[:, None]
    radius = torch.where(in_row, radius.minimum(0.42 / number.clamp(min=1)[:, None]), radius)
    x, y = _positions(scenes, dice, radius[:, :1])
    angle = torch.zeros_like(x)
    kind = _field(scenes, "shape")[:, None].repeat(1, attr.MAX_NUMBER)
    colour = _field(scenes, "colour")[:, None].repeat(1, attr.MAX_NUMBER)
    kind[:, 1] = torch.where(pair, _field(scenes, "other_shape"), kind[:, 1])
    colour[:, 1] = torch.where(pair, _field(scenes, "other_colour"), colour[:, 1])
    shapes = Shapes(x, y, radius, angle, kind, colour, torch.zeros_like(time))
    return _move(shapes, _field(scenes, "motion"), dice.take(2), time)


def _positions(scenes: Tensor, dice: Dice, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Centres (B, MAX_NUMBER) for the arrangement each scene asks for; `radius` is (B, 1)."""
    jitter_x, jitter_y = dice.take(5) - 0.5, dice.take(5) - 0.5
    position, number = _field(scenes, "position"), _field(scenes, "number")
    slots = torch.arange(attr.MAX_NUMBER, device=scenes.device)
    # 1. One shape: near its place of the three by three, but inside the picture.
    margin = radius + 0.02
    one_x = (0.5 + 0.29 * ((position % 3) - 1)[:, None] + 0.05 * jitter_x).clamp(margin, 1 - margin)
    one_y = (0.5 + 0.29 * ((position // 3) - 1)[:, None] + 0.05 * jitter_y).clamp(margin, 1 - margin)
    # 2. Scattered: distinct cells of the three by three.
    cells = dice.take(9).argsort(dim=1)[:, : attr.MAX_NUMBER]
    free = (0.16 - radius).clamp(min=0.01) * 1.6
    scatter_x, scatter_y = (
        0.5 + 0.31 * (cells % 3 - 1) + free * jitter_x,
        0.5 + 0.31 * (cells // 3 - 1) + free * jitter_y,
    )
    # 3. In a row.
    row_x = (slots + 0.5) / number.clamp(min=1)[:, None] + 0 * jitter_x
    row_y = 0.5 + 0.2 * jitter_y[:, :1] + 0 * jitter_x
    # 4. A pair: the first relative to the second.
    pair_x, pair_y = _pair_positions(_field(scenes, "relation"), jitter_x, jitter_y)
    is_row, is_one = (position == 1)[:, None], (number == 1)[:, None]
    is_pair = (_field(scenes, "kind") == attr.PAIR)[:, None]
    x = torch.where(is_pair, pair_x, torch.where(is_one, one_x, torch.where(is_row, row_x, scatter_x)))
    y = torch.where(is_pair, pair_y, torch.where(is_one, one_y, torch.where(is_row, row_y, scatter_y)))
    return x, y


def _pair_positions(relation: Tensor, jitter_x: Tensor, jitter_y: Tensor) -> tuple[Tensor, Tensor]:
    towards = torch.tensor([[0.0, -1.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]], device=relation.device)[relation]
    first_or_second = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0], device=relation.device)
    x = 0.5 + 0.23 * towards[:, :1] * first_or_second + 0.06 * jitter_x
    y = 0.5 + 0.23 * towards[:, 1:] * first_or_second + 0.06 * jitter_y
    return x, y


def _move(shapes: Shapes, motion: Tensor, rolls: Tensor, time: Tensor) -> Shapes:
    """The shapes at `time` (B,); a travel goes from one side of the middle to the other."""
    travel = ((time - 0.5) * (0.5 + 0.12 * rolls[:, 0]))[:, None]
    rolls_along = (motion == attr.ROLL_RIGHT).float() - (motion == attr.ROLL_LEFT).float()
    along_x = (motion == attr.RIGHT).float() - (motion == attr.LEFT).float() + rolls_along
    along_y = (motion == attr.DOWN).float() - (motion == attr.UP).float()
    # Two bounces in the time of a clip, parabolas from the ground.
    phase = torch.remainder(2 * time + rolls[:, 1], 1.0)
    height = 0.45 * 4 * phase * (1 - phase)
    bounces = (motion == attr.BOUNCE).float()
    ground = (1 - bounces)[:, None] * shapes.y + bounces[:, None] * (0.97 - shapes.radius - height[:, None])
    grows = (motion == attr.GROW).float() - (motion == attr.SHRINK).float()
    radius = shapes.radius * (1 + 0.8 * grows * (time - 0.5)).clamp(min=0.1)[:, None]
    # Rolling without slipping turns by the way gone over the radius.
    angle = rolls_along[:, None] * travel / shapes.radius.clamp(min=0.05)
    return Shapes(
        x=shapes.x + along_x[:, None] * travel,
        y=ground + along_y[:, None] * travel,
        radius=radius,
        angle=angle,
        kind=shapes.kind,
        colour=shapes.colour,
        spot=rolls_along.abs(),
    )
