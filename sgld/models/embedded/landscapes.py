"""Draws landscapes: a sky by time of day, sun or moon, clouds, and mountains, hills, the sea or a desert below."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sgld.models.embedded import attributes as attr
from sgld.models.embedded import drawing
from sgld.models.embedded.drawing import Canvas, Dice, lerp, pixel

# sRGB in [0, 1] by time of day (sunset, night, noon, dawn).
ZENITH = ((0.24, 0.12, 0.40), (0.01, 0.02, 0.09), (0.10, 0.40, 0.86), (0.44, 0.54, 0.80))
MIDDLE = ((0.85, 0.30, 0.34), (0.03, 0.06, 0.20), (0.38, 0.67, 0.96), (0.86, 0.72, 0.84))
HORIZON = ((1.00, 0.70, 0.30), (0.10, 0.15, 0.34), (0.76, 0.91, 1.00), (1.00, 0.86, 0.76))
DISC = ((1.00, 0.90, 0.55), (0.96, 0.96, 0.90), (1.00, 0.97, 0.70), (1.00, 0.94, 0.78))
GLOW = ((1.00, 0.62, 0.22), (0.30, 0.36, 0.55), (1.00, 1.00, 0.85), (1.00, 0.84, 0.66))
CLOUD = ((0.99, 0.55, 0.45), (0.14, 0.18, 0.32), (1.00, 1.00, 1.00), (1.00, 0.92, 0.92))
# What the light of the hour does to the colours of the ground.
LIGHT = ((0.80, 0.50, 0.44), (0.26, 0.32, 0.50), (1.00, 1.00, 1.00), (0.84, 0.76, 0.84))
SEA = ((0.24, 0.20, 0.42), (0.02, 0.05, 0.16), (0.05, 0.30, 0.62), (0.34, 0.46, 0.66))
ROCK, GRASS, SAND = (0.40, 0.41, 0.50), (0.27, 0.60, 0.22), (0.93, 0.72, 0.42)
# Where the sun or moon stands when it doesn't move, by time of day.
DISC_HEIGHT = ((0.36, 0.52), (0.12, 0.30), (0.12, 0.28), (0.34, 0.50))
HORIZON_Y = 0.60


@dataclass(frozen=True)
class Sky:
    """What the ground needs to know of the sky; colours (B, 3, 1, 1), places (B, 1, 1, 1)."""

    time: Tensor
    horizon: Tensor
    light: Tensor
    glow: Tensor
    disc_x: Tensor
    has_disc: Tensor
    moment: Tensor


def render_landscapes(scenes: Tensor, dice: Dice, canvas: Canvas, time: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] of scenes (B, fields of Scene), at `time` (B,): 0 is the start, 1 the end."""
    picture, sky = _sky(scenes, dice, canvas, time)
    grounds = (_mountains, _hills, _sea, _desert)
    place = _field(scenes, "place")
    ground_rolls = dice.take(150)
    for index, draw in enumerate(grounds):
        rows = (place == index).nonzero()[:, 0]
        if len(rows):
            some = Sky(*(value[rows] for value in vars(sky).values()))
            extra = pixel(_field(scenes, "extra")[rows])
            picture[rows] = draw(picture[rows], some, extra, Dice(ground_rolls[rows]), canvas)
    return picture.clamp(0, 1)


def _field(scenes: Tensor, name: str) -> Tensor:
    return scenes[:, attr.Scene._fields.index(name)]


def _table(rows: tuple[tuple[float, ...], ...], index: Tensor) -> Tensor:
    return torch.tensor(rows, device=index.device)[index]


def _sky(scenes: Tensor, dice: Dice, canvas: Canvas, time: Tensor) -> tuple[Tensor, Sky]:
    hour = _field(scenes, "time")
    jitter = (dice.take(9) - 0.5).view(-1, 3, 3, 1, 1) * 0.07
    zenith, middle, horizon = (
        (_table(table, hour)[:, :, None, None] + jitter[:, i]).clamp(0, 1)
        for i, table in enumerate((ZENITH, MIDDLE, HORIZON))
    )
    down = canvas.y / HORIZON_Y
    picture = lerp(zenith, middle, (down / 0.6).clamp(0, 1))
    picture = lerp(picture, horizon, ((down - 0.5) / 0.5).clamp(0, 1)).expand(-1, 3, canvas.height, canvas.width)
    picture = _stars(picture, hour, dice.take(1), canvas)
    x, y = _disc_place(scenes, dice.take(3), time)
    has_disc, x = pixel(_field(scenes, "has_disc").float()), pixel(x) * canvas.aspect
    dx, dy = canvas.x - x, canvas.y - pixel(y)
    distance, radius = (dx * dx + dy * dy).sqrt(), dice.between(0.055, 0.085)
    glow = _table(GLOW, hour)[:, :, None, None]
    strength = torch.tensor((0.75, 0.35, 0.55, 0.6), device=hour.device)[hour]
    picture = lerp(picture, glow, has_disc * pixel(strength) * (-(distance - radius).clamp(min=0) / 0.16).exp())
    picture = lerp(picture, _table(DISC, hour)[:, :, None, None], has_disc * canvas.cover(distance - radius))
    picture = _clouds(picture, scenes, dice, canvas, time)
    light = _table(LIGHT, hour)[:, :, None, None]
    return picture, Sky(hour, horizon, light, glow, x, has_disc, pixel(time))


def _disc_place(scenes: Tensor, rolls: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Where the sun or moon stands, each (B,) as fractions of width and height."""
    hour, motion = _field(scenes, "time"), _field(scenes, "motion")
    low, high = _table(DISC_HEIGHT, hour).unbind(1)
    x = 0.5 + 0.28 * (_field(scenes, "side") - 1) + 0.08 * (rolls[:, 0] - 0.5)
    y = low + (high - low) * rolls[:, 1]
    vertical = (motion == attr.DOWN).float() - (motion == attr.UP).float()
    # A rising disc starts behind the ground, a setting one ends there.
    y = torch.where(vertical != 0, 0.40 + vertical * (time - 0.5) * 0.46, y)
    sideways = (motion == attr.RIGHT).float() - (motion == attr.LEFT).float()
    y = torch.where(sideways != 0, 0.14 + 0.14 * rolls[:, 2], y)
    return x + sideways * (time - 0.5) * 0.62, y


def _stars(picture: Tensor, hour: Tensor, seed: Tensor, canvas: Canvas) -> Tensor:
    """About one star in every second cell of a grid, at night."""
    cell = 1 / 12
    column, row = (canvas.x / cell).floor(), (canvas.y / cell).floor()
    number = column * 12.9898 + row * 78.233 + pixel(seed[:, 0]) * 311.7
    random = [torch.frac(torch.sin(number + shift) * 4375.85).abs() for shift in (0.0, 1.7, 3.1)]
    dx, dy = canvas.x - (column + 0.2 + 0.6 * random[0]) * cell, canvas.y - (row + 0.2 + 0.6 * random[1]) * cell
    radius = 0.0035 + 0.004 * random[2]
    shine = canvas.cover((dx * dx + dy * dy).sqrt() - radius, 1.6) * (random[2] > 0.35) * (canvas.y < 0.5)
    return lerp(picture, torch.ones(1, 3, 1, 1, device=picture.device), shine * pixel((hour == 1).float()) * 0.9)


def _clouds(picture: Tensor, scenes: Tensor, dice: Dice, canvas: Canvas, time: Tensor) -> Tensor:
    """Three clouds, each four discs over a flat base."""
    hour, motion = _field(scenes, "time"), _field(scenes, "motion")
    drift = (motion == attr.CLOUDS_RIGHT).float() - (motion == attr.CLOUDS_LEFT).float()
    white = _table(CLOUD, hour)[:, :, None, None]
    shown = pixel(_field(scenes, "has_clouds").float())
    rolls = dice.take(15)
    for index in range(3):
        roll = rolls[:, index * 5 : index * 5 + 5]
        place = (index + 0.5 + 0.5 * (roll[:, 0] - 0.5)) / 3 + drift * (time - 0.5) * 0.55
        # A cloud that leaves on one side comes back on the other, out of sight.
        x = pixel(torch.remainder(place + 0.25, 1.5) - 0.25) * canvas.aspect
        base, size = pixel(0.12 + 0.24 * roll[:, 1]), pixel(0.07 + 0.06 * roll[:, 2])
        dx, dy = (canvas.x - x) / size, (canvas.y - base) / size
        puffs = torch.stack(
            [
                drawing.circle((dx - at) / wide, (dy + rise) / wide) * wide
                for at, rise, wide in ((-1.1, 0.15, 0.42), (-0.35, 0.42, 0.62), (0.5, 0.30, 0.52), (1.2, 0.12, 0.36))
            ]
        ).amin(0)
        distance = torch.maximum(puffs, dy) * size
        shade = lerp(white, picture, 0.45 * (dy + 1).clamp(0, 1))
        picture = lerp(picture, shade, canvas.cover(distance, 1.6) * shown)
    return picture


def _layer(picture: Tensor, top: Tensor, paint: Tensor, canvas: Canvas) -> Tensor:
    """Paints everything below the line `top` (B, 1, 1, W)."""
    return lerp(picture, paint, canvas.cover(top - canvas.y))


def _light_colour(sky: Sky, rgb: tuple[float, float, float]) -> Tensor:
    return torch.tensor(rgb, device=sky.light.device).view(1, 3, 1, 1) * sky.light


def _mountains(picture: Tensor, sky: Sky, extra: Tensor, dice: Dice, canvas: Canvas) -> Tensor:
    rock, snow = _light_colour(sky, ROCK), lerp(_light_colour(sky, (1.0, 1.0, 1.0)), sky.horizon, 0.35)
    x = canvas.x / canvas.aspect
    top = sky.horizon
    for base, height, haze in ((0.64, 0.36, 0.50), (0.76, 0.26, 0.22), (0.92, 0.17, 0.0)):
        # Every second knot is a summit.
        knots = dice.take(8)
        summits = knots * 0.45 + 0.55 * (torch.arange(8, device=knots.device) % 2)
        rough = 0.75 * drawing.ridge(summits, x, smooth=False) + 0.16 * drawing.ridge(dice.take(19), x, smooth=False)
        zigzag = drawing.ridge(dice.take(15), x, smooth=False)
        top = base - height * rough
        paint = lerp(rock * (1 - 0.35 * (1 - haze)), sky.horizon, haze * 0.75)
        paint = paint * (1 - 0.25 * ((canvas.y - top) / 0.4).clamp(0, 1))
        if haze:
            capped = canvas.cover(canvas.y - (base - height * 0.52 - 0.05 * zigzag))
            paint = lerp(paint, lerp(snow, sky.horizon, haze * 0.3), capped)
        picture = _layer(picture, top, paint, canvas)
    return _trees_or_house(picture, sky, extra, dice, canvas, top)


def _hills(picture: Tensor, sky: Sky, extra: Tensor, dice: Dice, canvas: Canvas) -> Tensor:
    grass, x = _light_colour(sky, GRASS), canvas.x / canvas.aspect
    top = sky.horizon
    for base, height, haze in ((0.64, 0.12, 0.45), (0.76, 0.14, 0.15), (0.90, 0.14, 0.0)):
        top = base - height * drawing.ridge(dice.take(5), x, smooth=True)
        paint = lerp(grass, sky.horizon, haze) * (1 - 0.30 * ((canvas.y - top) / 0.3).clamp(0, 1))
        picture = _layer(picture, top, paint, canvas)
    return _trees_or_house(picture, sky, extra, dice, canvas, top)


def _desert(picture: Tensor, sky: Sky, extra: Tensor, dice: Dice, canvas: Canvas) -> Tensor:
    sand, x = _light_colour(sky, SAND), canvas.x / canvas.aspect
    top = sky.horizon
    for base, height, haze in ((0.62, 0.09, 0.35), (0.74, 0.14, 0.12), (0.90, 0.16, 0.0)):
        top = base - height * drawing.ridge(dice.take(4), x, smooth=True)
        # The shaded side begins at a winding line below the crest.
        winding = 0.02 + 0.16 * drawing.ridge(dice.take(5), x, smooth=True)
        paint = lerp(sand, sky.horizon, haze)
        paint = lerp(paint, paint * 0.78, canvas.cover(top + winding - canvas.y))
        picture = _layer(picture, top, paint, canvas)
    return _cacti(picture, sky, extra, dice, canvas)


def _sea(picture: Tensor, sky: Sky, extra: Tensor, dice: Dice, canvas: Canvas) -> Tensor:
    down = ((canvas.y - HORIZON_Y) / (1 - HORIZON_Y)).clamp(0, 1)
    deep = _table(SEA, sky.time)[:, :, None, None]
    paint = lerp(lerp(deep, sky.horizon, 0.45), deep, (down * 1.6).clamp(0, 1))
    # Waves: bands that widen towards the viewer, broken up along x.
    phase, flow = dice.between(0, 6.28), sky.moment * 5.0
    band = torch.sin(70 * down.sqrt() + phase - flow + 1.5 * torch.sin(canvas.x * 7 + phase * 3))
    broken = torch.sin(canvas.x * (26 - 12 * down) + 9 * torch.sin(down * 23 + phase) + flow)
    crest = ((band - 0.55) * 3).clamp(0, 1) * ((broken + 0.1) * 2.5).clamp(0, 1)
    paint = lerp(paint, sky.horizon, 0.30 * crest)
    width = 0.05 + 0.16 * down
    glitter = ((band + 0.15) * 3).clamp(0, 1) * ((width - (canvas.x - sky.disc_x).abs() + 0.05 * broken) * 30).clamp(
        0, 1
    )
    paint = lerp(paint, lerp(sky.glow, torch.ones_like(sky.glow), 0.4), 0.8 * glitter * sky.has_disc)
    picture = _layer(picture, HORIZON_Y + 0 * canvas.x, paint, canvas)
    return _boat(picture, sky, extra, dice, canvas)


def _trees_or_house(picture: Tensor, sky: Sky, extra: Tensor, dice: Dice, canvas: Canvas, top: Tensor) -> Tensor:
    """Conifers along the nearest ridge, or a house on it."""
    leaves = _light_colour(sky, (0.08, 0.26, 0.14)) * 0.8
    rolls = dice.take(16)
    for index in range(8):
        place = (index + 0.15 + 0.7 * rolls[:, index]) / 8
        size = pixel(0.055 + 0.05 * rolls[:, index + 8])
        ground = _height_at(top, place)
        dx, dy = (canvas.x - pixel(place) * canvas.aspect) / size, (canvas.y - ground) / size
        tiers = [
            drawing.triangle(dx, dy + rise, wide, 0.42) for rise, wide in ((0.5, 0.52), (0.95, 0.42), (1.35, 0.30))
        ]
        tree = torch.stack([*tiers, drawing.box(dx, dy, 0.07, 0.25)]).amin(0)
        picture = lerp(picture, leaves, canvas.cover(tree * size) * (extra == 1))
    return _house(picture, sky, extra, dice, canvas, top)


def _height_at(top: Tensor, place: Tensor) -> Tensor:
    """The height of the line `top` (B, 1, 1, W) at the fraction `place` (B,) of the width, (B, 1, 1, 1)."""
    column = (place * top.shape[-1]).long().clamp(0, top.shape[-1] - 1)
    return pixel(top[:, 0, 0].gather(1, column[:, None])[:, 0]) + 0.012


def _house(picture: Tensor, sky: Sky, extra: Tensor, dice: Dice, canvas: Canvas, top: Tensor) -> Tensor:
    place, size = 0.2 + 0.6 * dice.take(1)[:, 0], dice.between(0.065, 0.095)
    dx = (canvas.x - pixel(place) * canvas.aspect) / size
    dy = (canvas.y - _height_at(top, place) - 0.01) / size
    shown = extra == 2
    walls, roof = _light_colour(sky, (0.93, 0.87, 0.76)), _light_colour(sky, (0.72, 0.22, 0.16))
    picture = lerp(picture, walls, canvas.cover(drawing.box(dx, dy + 0.5, 0.8, 0.55) * size) * shown)
    picture = lerp(picture, roof, canvas.cover(drawing.triangle(dx, dy + 1.45, 1.05, 0.42) * size) * shown)
    # Lit from inside when it is dark.
    lit = torch.tensor((0.8, 1.0, 0.0, 0.3), device=extra.device)[sky.time].view(-1, 1, 1, 1)
    glass = lerp(
        _light_colour(sky, (0.30, 0.38, 0.50)),
        torch.tensor((1.0, 0.83, 0.35), device=extra.device).view(1, 3, 1, 1),
        lit,
    )
    window = torch.minimum(drawing.box(dx - 0.4, dy + 0.58, 0.18, 0.2), drawing.box(dx + 0.4, dy + 0.58, 0.18, 0.2))
    return lerp(picture, glass, canvas.cover(window * size) * shown)


def _boat(picture: Tensor, sky: Sky, extra: Tensor, dice: Dice, canvas: Canvas) -> Tensor:
    x, size = dice.between(0.2, 0.8) * canvas.aspect, dice.between(0.07, 0.11)
    dx, dy = (canvas.x - x) / size, (canvas.y - dice.between(0.66, 0.76)) / size
    shown = extra == 3
    hull = torch.maximum(drawing.box(dx, dy, 2.0, 0.22), dx.abs() + dy * 0.9 - 1.0)
    sail = torch.minimum(
        torch.maximum(drawing.triangle(dx - 0.05, dy + 1.15, 0.85, 0.8), 0.05 - dx),
        torch.maximum(drawing.triangle(dx + 0.05, dy + 1.0, 0.6, 0.65), dx + 0.05),
    )
    wood, cloth = _light_colour(sky, (0.50, 0.26, 0.14)), lerp(_light_colour(sky, (1.0, 0.98, 0.94)), sky.horizon, 0.2)
    picture = lerp(picture, wood, canvas.cover(hull * size) * shown)
    return lerp(picture, cloth, canvas.cover(sail * size) * shown)


def _cacti(picture: Tensor, sky: Sky, extra: Tensor, dice: Dice, canvas: Canvas) -> Tensor:
    green = _light_colour(sky, (0.20, 0.50, 0.26)) * 0.9
    rolls = dice.take(9)
    for index in range(3):
        x = pixel((index + 0.2 + 0.6 * rolls[:, index]) / 3) * canvas.aspect
        size, foot = pixel(0.09 + 0.06 * rolls[:, index + 3]), pixel(0.80 + 0.14 * rolls[:, index + 6])
        dx, dy = (canvas.x - x) / size, (canvas.y - foot) / size
        parts = [
            _pill(dx, dy + 0.8, 0.14, 0.8),
            _pill(dx - 0.45, dy + 1.05, 0.10, 0.28),
            _pill(dx + 0.45, dy + 0.90, 0.10, 0.30),
            drawing.box(dx - 0.22, dy + 0.85, 0.24, 0.09),
            drawing.box(dx + 0.22, dy + 0.68, 0.24, 0.09),
        ]
        picture = lerp(picture, green, canvas.cover(torch.stack(parts).amin(0) * size) * (extra == 4))
    return picture


def _pill(dx: Tensor, dy: Tensor, radius: float, half: float) -> Tensor:
    """Signed distance to an upright bar with round ends."""
    over = (dy.abs() - (half - radius)).clamp(min=0)
    return (dx * dx + over * over).sqrt() - radius
