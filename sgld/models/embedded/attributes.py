"""What a scene of the embedded models shows, as small integers, and which combinations training never sees."""

import random
import zlib
from typing import NamedTuple

LANDSCAPE, GROUP, PAIR = 0, 1, 2

TIMES = ("sunset", "night", "noon", "dawn")
PLACES = ("mountains", "hills", "sea", "desert")
# What may stand in a landscape, beside nothing at all.
EXTRAS = ("none", "trees", "house", "boat", "cactus")
EXTRAS_OF_PLACE = {0: (0, 0, 1, 2), 1: (0, 0, 1, 2), 2: (0, 3), 3: (0, 4)}
SIDES = ("left", "centre", "right")

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black", "gray")
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond")
SIZES = ("small", "medium", "large")
# Row by row from the top left; index // 3 is the row and index % 3 the column.
POSITIONS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
CENTRE = 4
RELATIONS = ("above", "below", "left of", "right of")

STILL, UP, DOWN, LEFT, RIGHT, CLOUDS_LEFT, CLOUDS_RIGHT, BOUNCE, ROLL_LEFT, ROLL_RIGHT, GROW, SHRINK = range(12)
MOTIONS = (
    "still",
    "up",
    "down",
    "left",
    "right",
    "clouds left",
    "clouds right",
    "bounce",
    "roll left",
    "roll right",
    "grow",
    "shrink",
)

MAX_NUMBER = 5
HELD_OUT_ONE_IN = 10


class Scene(NamedTuple):
    """One scene; every field is an index into the table of its name, and 0 where the kind doesn't use it."""

    kind: int
    time: int = 0
    place: int = 0
    # Whether the sun or the moon is in the picture, and at which of SIDES.
    has_disc: int = 0
    side: int = 0
    has_clouds: int = 0
    extra: int = 0
    colour: int = 0
    shape: int = 0
    size: int = 0
    # For one shape an index into POSITIONS; for several, 1 if they stand in a row and 0 if they are scattered.
    position: int = 0
    number: int = 0
    background: int = 0
    other_colour: int = 0
    other_shape: int = 0
    relation: int = 0
    motion: int = STILL


def is_held_out(scene: Scene) -> bool:
    """Whether training never draws this combination of attributes; one in ten is held out, by a stable hash."""
    return zlib.crc32(bytes(scene)) % HELD_OUT_ONE_IN == 0


def draw_scene(rng: random.Random, *, held_out: bool = False, moving: bool = False) -> Scene:
    """A random scene, from the held-out combinations or from all the others.

    :param moving: True for a video: the scene then has a motion.
    """
    while True:
        kind = rng.choices((LANDSCAPE, GROUP, PAIR), weights=(50, 42, 0 if moving else 22))[0]
        scene = (_draw_landscape, _draw_group, _draw_pair)[kind](rng, moving)
        if is_held_out(scene) == held_out:
            return scene


def _draw_landscape(rng: random.Random, moving: bool) -> Scene:
    time, place = rng.randrange(4), rng.randrange(4)
    scene = Scene(
        LANDSCAPE,
        time=time,
        place=place,
        has_disc=int(rng.random() < 0.8),
        side=rng.randrange(3),
        has_clouds=int(rng.random() < 0.5),
        extra=rng.choice(EXTRAS_OF_PLACE[place]),
    )
    if moving:
        # Nothing sets at dawn and nothing rises at sunset.
        vertical = {0: (DOWN,), 3: (UP,)}.get(time, (UP, DOWN))
        motion = rng.choice((rng.choice(vertical), rng.choice((LEFT, RIGHT)), rng.choice((CLOUDS_LEFT, CLOUDS_RIGHT))))
        clouds = motion in (CLOUDS_LEFT, CLOUDS_RIGHT)
        scene = scene._replace(
            motion=motion,
            has_disc=scene.has_disc if clouds else 1,
            has_clouds=1 if clouds else int(rng.random() < 0.3),
            # A disc that travels sideways has no side worth naming.
            side=1 if motion in (LEFT, RIGHT) else scene.side,
        )
    return scene if scene.has_disc else scene._replace(side=0)


def _draw_colours(rng: random.Random, number: int) -> list[int]:
    """Distinct colours, the last of them for the background, where white, black and gray are more usual."""
    background = rng.choice((8, 8, 8, 9, 10, rng.randrange(11), rng.randrange(11)))
    others = [colour for colour in range(11) if colour != background]
    return [*rng.sample(others, number - 1), background]


def _draw_group(rng: random.Random, moving: bool) -> Scene:
    colour, background = _draw_colours(rng, 2)
    number = 1 if moving else rng.choice((1, 1, 1, 1, 2, 3, 4, 5))
    position = rng.choice((CENTRE, rng.randrange(9))) if number == 1 else rng.randrange(2)
    scene = Scene(
        GROUP,
        colour=colour,
        shape=rng.randrange(6),
        size=rng.randrange(3),
        position=position,
        number=number,
        background=background,
    )
    if moving:
        motion = rng.choice((UP, DOWN, LEFT, RIGHT, LEFT, RIGHT, BOUNCE, ROLL_LEFT, ROLL_RIGHT, GROW, SHRINK))
        # Only a medium or small shape has room to travel; a growing one passes through all sizes.
        scene = scene._replace(motion=motion, position=CENTRE, size=1 if motion >= GROW else rng.randrange(2))
    return scene


def _draw_pair(rng: random.Random, moving: bool) -> Scene:
    assert not moving
    colour, other, background = _draw_colours(rng, 3)
    return Scene(
        PAIR,
        colour=colour,
        shape=rng.randrange(6),
        number=1,
        size=1,
        background=background,
        other_colour=other,
        other_shape=rng.randrange(6),
        relation=rng.randrange(4),
    )
