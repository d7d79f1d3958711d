from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sgld.errors import PipelineFailed
from sgld.worker.pixels import pixels_of, to_uint8

RED = torch.tensor([1.0, 0.0, 0.0])
CHANNELS_FIRST = RED.reshape(1, 3, 1, 1).expand(1, 3, 4, 6)
VIDEO = CHANNELS_FIRST.reshape(1, 1, 3, 4, 6).expand(1, 5, 3, 4, 6)
PICTURE = Image.new("RGB", (6, 4), "red")


@pytest.mark.parametrize(
    "images",
    [
        CHANNELS_FIRST,
        CHANNELS_FIRST.permute(0, 2, 3, 1),
        CHANNELS_FIRST.permute(0, 2, 3, 1).numpy(),
        [PICTURE],
        [PICTURE.convert("RGBA")],
        [CHANNELS_FIRST[0]],
        CHANNELS_FIRST.repeat(2, 1, 1, 1),
    ],
)
def test_a_picture_is_one_frame(images: Any) -> None:
    pixels = pixels_of(SimpleNamespace(images=images))
    assert (tuple(pixels.frames.shape), pixels.frames.dtype, pixels.is_video) == ((1, 4, 6, 3), torch.uint8, False)
    assert {tuple(colour) for colour in pixels.frames.reshape(-1, 3).tolist()} == {(255, 0, 0)}


@pytest.mark.parametrize(
    "frames",
    [
        VIDEO,
        VIDEO.permute(0, 1, 3, 4, 2),
        VIDEO.permute(0, 1, 3, 4, 2).numpy(),
        [[PICTURE] * 5],
        [VIDEO[0]],
        [VIDEO.permute(0, 1, 3, 4, 2).numpy()[0]],
    ],
)
def test_a_video_has_its_frames(frames: Any) -> None:
    pixels = pixels_of(SimpleNamespace(frames=frames))
    assert (tuple(pixels.frames.shape), pixels.frames.dtype, pixels.is_video) == ((5, 4, 6, 3), torch.uint8, True)
    assert {tuple(colour) for colour in pixels.frames.reshape(-1, 3).tolist()} == {(255, 0, 0)}


def test_the_first_of_a_tuple_is_shown() -> None:
    assert not pixels_of((CHANNELS_FIRST, "a second result")).is_video
    assert pixels_of((VIDEO, None)).is_video


@pytest.mark.parametrize(
    "result",
    [
        SimpleNamespace(),
        SimpleNamespace(images=None),
        SimpleNamespace(images=[]),
        SimpleNamespace(images=torch.ones(1, 4, 8, 8)),
        SimpleNamespace(images=torch.ones(3, 8)),
        SimpleNamespace(images=["a", "b"]),
        (),
        (1,),
        "text",
        None,
    ],
)
def test_results_without_pictures_are_refused(result: Any) -> None:
    with pytest.raises(PipelineFailed, match="without RGB pictures"):
        pixels_of(result)


def test_values_are_rounded_and_cut_as_diffusers_does() -> None:
    values = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 0.5, 1.0, 7.0])
    expected = (values.clamp(0, 1).numpy() * 255).round().astype(np.uint8)
    assert to_uint8(values).tolist() == expected.tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_half_precision_is_rounded_as_full() -> None:
    values = torch.arange(256) / 255
    assert to_uint8(values.bfloat16()).tolist() == to_uint8(values.bfloat16().float()).tolist()


def test_whole_numbers_stay() -> None:
    frames = torch.arange(12, dtype=torch.uint8)
    assert to_uint8(frames) is frames
