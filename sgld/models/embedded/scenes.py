"""Draws batches of scenes for the embedded models: the same numbers always give the same pictures.

A scene is a row of attributes; what they leave open (the line of the hills, where exactly the sun stands) comes from
`NUM_DICE` uniform numbers for each row.
"""

import random

import torch
from torch import Tensor

from sgld.models.embedded.attributes import LANDSCAPE, Scene, draw_scene
from sgld.models.embedded.drawing import Canvas, Dice
from sgld.models.embedded.landscapes import render_landscapes
from sgld.models.embedded.shapes import render_shapes

NUM_DICE = 192
# Frames from time 0 to time 1 of a motion.
FRAMES_OF_MOTION = 16


def draw_scenes(count: int, seed: int, *, held_out: bool = False, moving: bool = False) -> list[Scene]:
    """The scenes of a seed."""
    rng = random.Random(seed)
    return [draw_scene(rng, held_out=held_out, moving=moving) for _ in range(count)]


def draw_dice(count: int, generator: torch.Generator) -> Tensor:
    """What the attributes leave open, (count, NUM_DICE) uniform in [0, 1), on the generator's device."""
    return torch.rand(count, NUM_DICE, generator=generator, device=generator.device)


def render(scenes: Tensor, dice: Tensor, height: int, width: int, time: Tensor | None = None) -> Tensor:
    """Pictures (B, 3, height, width) float32 in [0, 1].

    :param scenes: (B, fields of Scene) int64.
    :param dice: (B, NUM_DICE), from draw_dice.
    :param time: (B,) from 0 (start of the motion) to 1 (its end); the start where it is missing.
    """
    if time is None:
        time = torch.zeros(len(scenes), device=scenes.device)
    canvas = Canvas(height, width, scenes.device)
    pictures = torch.empty(len(scenes), 3, height, width, device=scenes.device)
    is_landscape = scenes[:, 0] == LANDSCAPE
    for rows, draw in ((is_landscape, render_landscapes), (~is_landscape, render_shapes)):
        if bool(rows.any()):
            pictures[rows] = draw(scenes[rows], Dice(dice[rows]), canvas, time[rows])
    return pictures


def render_clips(scenes: Tensor, dice: Tensor, num_frames: int, height: int, width: int) -> Tensor:
    """Clips (B, 3, num_frames, height, width) float32 in [0, 1]; the motion ends at frame FRAMES_OF_MOTION or later."""
    time = torch.arange(num_frames, device=scenes.device) / FRAMES_OF_MOTION
    frames = render(
        scenes.repeat_interleave(num_frames, 0),
        dice.repeat_interleave(num_frames, 0),
        height,
        width,
        time.repeat(len(scenes)),
    )
    return frames.view(len(scenes), num_frames, 3, height, width).transpose(1, 2)
