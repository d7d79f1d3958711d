"""Says what a picture shows by looking at its pixels only, to compare it with what its caption asked for.

Pictures are (3, H, W) float in [0, 1]; clips are (T, 3, H, W).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from sgld.models.embedded import attributes as attr
from sgld.models.embedded import shapes
from sgld.models.embedded.attributes import Scene
from sgld.models.embedded.scenes import draw_dice, render

# Pixels further than this from the background's colour (Euclidean, RGB in [0, 1]) belong to a shape.
BACKGROUND_RADIUS = 0.18
# Smaller spots than this part of the picture are noise; the smallest shape covers 0.6 %.
MIN_AREA = 0.0025
# How far, as a fraction of the side, something must go in a clip to have moved.
MIN_TRAVEL = 0.10


@dataclass(frozen=True)
class Found:
    """A shape in a picture: indices into the tables of attributes; box centre and height as fractions of the side."""

    colour: int
    shape: int
    x: float
    y: float
    height: float


def agreement(scene: Scene, picture: Tensor) -> dict[str, bool]:
    """For each attribute that the scene's plain caption names: does the picture show it?"""
    if scene.kind == attr.LANDSCAPE:
        time, place = look_at_landscape(picture)
        return {"time": time == scene.time, "place": place == scene.place}
    background, found = look_at_shapes(picture)
    seen = {"background": background == scene.background}
    if scene.kind == attr.GROUP:
        return seen | _agreement_of_group(scene, found)
    return seen | _agreement_of_pair(scene, found)


def _agreement_of_group(scene: Scene, found: list[Found]) -> dict[str, bool]:
    seen = {
        "colour": bool(found) and all(shape.colour == scene.colour for shape in found),
        "shape": bool(found) and sum(shape.shape == scene.shape for shape in found) * 2 > len(found),
        "number": len(found) == scene.number,
    }
    if scene.number == 1 and scene.motion == attr.STILL:
        seen["position"] = len(found) == 1 and _position(found[0]) == scene.position
        seen["size"] = len(found) == 1 and (found[0].height > 0.28) + (found[0].height > 0.46) == scene.size
    return seen


def _agreement_of_pair(scene: Scene, found: list[Found]) -> dict[str, bool]:
    wanted = {(scene.colour, scene.shape), (scene.other_colour, scene.other_shape)}
    first = next((shape for shape in found if shape.colour == scene.colour), None)
    second = next((shape for shape in found if shape.colour == scene.other_colour), None)
    return {
        "colour": {shape.colour for shape in found} == {scene.colour, scene.other_colour},
        "shape": {(shape.colour, shape.shape) for shape in found} == wanted,
        "number": len(found) == 2,
        "position": first is not None and second is not None and _relation(first, second) == scene.relation,
    }


def _position(found: Found) -> int:
    column, row = ((place > 0.39) + (place > 0.61) for place in (found.x, found.y))
    return row * 3 + column


def _relation(first: Found, second: Found) -> int:
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dy) > abs(dx):
        return 0 if dy < 0 else 1
    return 2 if dx < 0 else 3


def look_at_shapes(picture: Tensor) -> tuple[int, list[Found]]:
    """The background's colour and the shapes, largest first."""
    small = functional.interpolate(picture[None], (128, 128), mode="area")[0]
    border = torch.cat([small[:, :2].flatten(1), small[:, -2:].flatten(1), small[:, :, :2].flatten(1)], dim=1)
    background = border.median(1).values
    mask = (small - background[:, None, None]).norm(dim=0) > BACKGROUND_RADIUS
    labels = _components(mask)
    found = []
    for label in torch.unique(labels).tolist():
        part = labels == label
        if label and part.sum() >= MIN_AREA * part.numel():
            found.append(_describe(part, small))
    return nearest_colour(background), sorted(found, key=lambda shape: -shape.height)


def nearest_colour(rgb: Tensor) -> int:
    """The index of the colour that (3,) is nearest to."""
    return int((torch.tensor(shapes.COLOUR_VALUES) - rgb).norm(dim=1).argmin())


def _components(mask: Tensor) -> Tensor:
    """One label (from 1) for each connected part of the mask (H, W), 0 outside."""
    labels = torch.arange(1, mask.numel() + 1).view_as(mask) * mask
    while True:
        # A cross, not a square: corners that touch don't join.
        tall, wide = ((3, 1), (1, 0)), ((1, 3), (0, 1))
        spread = [functional.max_pool2d(labels[None, None].float(), k, 1, p)[0, 0].long() for k, p in (tall, wide)]
        grown = torch.maximum(*spread) * mask
        if torch.equal(grown, labels):
            return labels
        labels = grown


def _describe(part: Tensor, picture: Tensor) -> Found:
    rows, columns = part.any(1).nonzero()[:, 0], part.any(0).nonzero()[:, 0]
    top, bottom, left, right = (int(edge) for edge in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
    outline = functional.interpolate(part[None, None, top:bottom, left:right].float(), (32, 32), mode="bilinear")[0, 0]
    outline = outline > 0.5
    overlap = [(outline & mould).sum() / (outline | mould).sum() for mould in _moulds()]
    side = part.shape[0]
    return Found(
        colour=nearest_colour(picture[:, part].median(1).values),
        shape=int(torch.stack(overlap).argmax()),
        x=(left + right) / 2 / side,
        y=(top + bottom) / 2 / side,
        height=(bottom - top) / side,
    )


@cache
def _moulds() -> list[Tensor]:
    """The outline of each shape, stretched to 32x32."""
    axis = torch.linspace(-1.5, 1.5, 256)
    moulds = []
    for kind in range(len(attr.SHAPES)):
        inside = shapes.distance(torch.tensor([kind]), axis.view(1, 1, 1, -1), axis.view(1, 1, -1, 1))[0, 0] < 0
        rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
        cut = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        moulds.append(functional.interpolate(cut[None, None].float(), (32, 32), mode="area")[0, 0] > 0.5)
    return moulds


def look_at_landscape(picture: Tensor) -> tuple[int, int]:
    """Time of day and place, by the nearest typical colours of the upper sky, and then of the ground."""
    sky, ground = _sky_colours(picture), _ground_features(picture)
    skies, grounds = _typical()
    time = int((skies - sky).norm(dim=1).argmin())
    place = int((grounds[time] - ground).norm(dim=1).argmin())
    return time, place


def _strip(picture: Tensor, top: float, bottom: float, quantile: float = 0.5) -> Tensor:
    """The median colour of a horizontal strip, or another quantile of each channel."""
    height = picture.shape[1]
    return picture[:, int(top * height) : int(bottom * height)].flatten(1).quantile(quantile, dim=1)


def _sky_colours(picture: Tensor) -> Tensor:
    # Clouds are brighter than their sky, so that the darker part is the sky.
    return torch.cat([_strip(picture, 0.0, 0.06, 0.2), _strip(picture, 0.22, 0.28, 0.2)])


def _ground_features(picture: Tensor) -> Tensor:
    """The ground's colour near and in the middle, relative to its brightness: nights are dark but not gray."""
    near, middle = _strip(picture, 0.92, 1.0), _strip(picture, 0.78, 0.86)
    hue = [colour / (colour.norm() + 0.05) for colour in (near, middle)]
    # The sea begins at one height from left to right.
    band = functional.interpolate(picture[None], (64, 64), mode="area")[0, :, 34:44]
    step = (band[:, 1:] - band[:, :-1]).norm(dim=0)
    straight = (step.median(1).values.max() / (step.max(0).values.median() + 0.02)).clamp(max=1)
    return torch.cat([*hue, near, straight[None] * 0.5])


@cache
def _typical() -> tuple[Tensor, Tensor]:
    """Colours of drawn scenes: of the sky by time (4, 6), of the ground by time and place (4, 4, features)."""
    generator = torch.Generator().manual_seed(0)
    skies, grounds = torch.zeros(4, 6), []
    for time in range(4):
        for place in range(4):
            scenes = torch.tensor([Scene(attr.LANDSCAPE, time, place)] * 12)
            pictures = render(scenes, draw_dice(12, generator), 128, 128)
            skies[time] += torch.stack([_sky_colours(picture) for picture in pictures]).mean(0) / 4
            grounds.append(torch.stack([_ground_features(picture) for picture in pictures]).mean(0))
    return skies, torch.stack(grounds).view(4, 4, -1)


def agreement_of_clip(scene: Scene, clip: Tensor) -> dict[str, bool]:
    """As `agreement`, by the middle frame, and whether what moves goes the way the caption says."""
    middle = agreement(scene, clip[len(clip) // 2])
    if scene.kind == attr.LANDSCAPE:
        seen = {name: middle[name] for name in ("time", "place")}
    else:
        seen = {name: middle[name] for name in ("background", "colour", "shape")}
    direction = _direction(scene)
    if direction is None:
        return seen
    axis, sign = direction
    return seen | {"direction": sign * _travel(clip, axis, scene) > MIN_TRAVEL}


def _direction(scene: Scene) -> tuple[int, int] | None:
    """Axis (0 for x, 1 for y) and sign of the motion, where the caption names one and the pixels can tell."""
    return {
        attr.UP: (1, -1),
        attr.DOWN: (1, 1),
        attr.LEFT: (0, -1),
        attr.RIGHT: (0, 1),
        attr.ROLL_LEFT: (0, -1),
        attr.ROLL_RIGHT: (0, 1),
    }.get(scene.motion)


def _travel(clip: Tensor, axis: int, scene: Scene) -> float:
    """How far the shape, or the sun or moon, goes along the axis, as a fraction of the side."""
    places = [_disc(frame) if scene.kind == attr.LANDSCAPE else _largest(frame) for frame in (clip[1], clip[-2])]
    if places[0] is None or places[1] is None:
        return 0.0
    return places[1][axis] - places[0][axis]


def _largest(frame: Tensor) -> tuple[float, float] | None:
    _, found = look_at_shapes(frame)
    return (found[0].x, found[0].y) if found else None


def _disc(frame: Tensor) -> tuple[float, float] | None:
    """The centre of the brightest pixels of the sky relative to their row, where sun and glow are."""
    sky = frame[:, : int(0.62 * frame.shape[1])].mean(0)
    over = (sky - sky.median(1, keepdim=True).values).clamp(min=0)
    weight = torch.where(over > 0.5 * over.max(), over, torch.zeros_like(over))
    if over.max() < 0.06:
        return None
    y, x = (torch.linspace(0, end, count) for end, count in zip((0.62, 1.0), sky.shape, strict=True))
    total = weight.sum()
    return float((weight.sum(0) * x).sum() / total), float((weight.sum(1) * y).sum() / total)
