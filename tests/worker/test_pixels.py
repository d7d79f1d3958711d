from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sgld.errors import PipelineFailed
from sgld.worker.pixels import Pixels, pixels_of, scaled, to_uint8

RED = torch.tensor([1.0, 0.0, 0.0])
CHANNELS_FIRST = RED.reshape(1, 3, 1, 1).expand(1, 3, 4, 6)
VIDEO = CHANNELS_FIRST.reshape(1, 1, 3, 4, 6).expand(1, 5, 3, 4, 6)
PICTURE = Image.new("RGB", (6, 4), "red")


def shown(value: Any, **choices: Any) -> Pixels:
    pixels = pixels_of(value, **choices)
    assert pixels is not None
    assert pixels.frames.dtype == torch.uint8
    return pixels


@pytest.mark.parametrize(
    "images",
    [
        CHANNELS_FIRST,
        CHANNELS_FIRST.permute(0, 2, 3, 1),
        CHANNELS_FIRST.permute(0, 2, 3, 1).numpy(),
        CHANNELS_FIRST[0],
        [PICTURE],
        [[PICTURE]],
        PICTURE,
        [PICTURE.convert("P")],
        [CHANNELS_FIRST[0]],
    ],
)
def test_a_picture_is_one_frame(images: Any) -> None:
    pixels = shown(images, is_video=False)
    assert (tuple(pixels.frames.shape), pixels.is_video) == ((1, 4, 6, 3), False)
    assert {tuple(colour) for colour in pixels.frames.reshape(-1, 3).tolist()} == {(255, 0, 0)}


@pytest.mark.parametrize(
    "frames",
    [
        VIDEO,
        VIDEO.permute(0, 1, 3, 4, 2),
        VIDEO.permute(0, 1, 3, 4, 2).numpy(),
        [[PICTURE] * 5],
        [PICTURE] * 5,
        [VIDEO[0]],
        VIDEO[0],
        [VIDEO.permute(0, 1, 3, 4, 2).numpy()[0]],
    ],
)
def test_a_video_has_its_frames(frames: Any) -> None:
    pixels = shown(frames, is_video=True)
    assert (tuple(pixels.frames.shape), pixels.is_video) == ((5, 4, 6, 3), True)
    assert {tuple(colour) for colour in pixels.frames.reshape(-1, 3).tolist()} == {(255, 0, 0)}


def test_axes_tell_videos_where_no_name_does() -> None:
    assert not shown(CHANNELS_FIRST).is_video
    assert shown(VIDEO).is_video


def test_all_pictures_of_a_result_are_shown() -> None:
    assert len(shown(CHANNELS_FIRST.repeat(2, 1, 1, 1), is_video=False).frames) == 2
    layers = shown([torch.rand(3, 4, 4, 6)], is_video=False)
    assert (tuple(layers.frames.shape), layers.is_video) == ((3, 4, 6, 4), False)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_kept(mode: str) -> None:
    picture = Image.new("RGBA", (6, 4), (9, 9, 9, 100)).convert(mode)
    assert shown([picture], is_video=False).frames[0, 0, 0].tolist() == [9, 9, 9, 100]
    tensor = torch.tensor([0.2, 0.4, 0.6, 0.8]).reshape(1, 4, 1, 1).expand(1, 4, 4, 6)
    assert shown(tensor, is_video=False).frames[0, 0, 0].tolist() == [51, 102, 153, 204]


@pytest.mark.parametrize(
    "value", [Image.new("L", (6, 4), 51), torch.full((1, 1, 4, 6), 0.2), np.full((1, 4, 6, 1), 0.2)]
)
def test_grey_pictures_have_three_equal_channels(value: Any) -> None:
    frames = shown(value, is_video=False).frames
    assert frames.shape == (1, 4, 6, 3)
    assert (frames == 51).all()


def test_depth_pictures_fill_the_range() -> None:
    depth = Image.fromarray(np.array([[10.0, 20.0], [30.0, 110.0]], np.float32))
    assert shown(depth, is_video=False).frames[0, ..., 0].tolist() == [[0, 26], [51, 255]]
    whole = Image.fromarray(np.array([[0, 65535]], np.uint16))
    assert shown(whole, is_video=False).frames[0, ..., 0].tolist() == [[0, 255]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, 0.5], [0.1, 0.5]),
        ([-1.0, 0.0, 1.0], [0.0, 0.5, 1.0]),
        ([-2.0, 0.0, 2.0], [0.0, 0.5, 1.0]),
        ([3.0, 3.0], [0.0, 0.0]),
        ([float("nan"), 1.0], [0.0, 1.0]),
    ],
)
def test_maps_are_scaled_only_where_they_must_be(values: list[float], expected: list[float]) -> None:
    assert scaled(torch.tensor(values)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "value",
    [None, [], torch.ones(1, 8, 8, 8), torch.ones(3, 8), ["a", "b"], 1, np.array(["a"]), [PICTURE, "a"]],
)
def test_what_is_no_picture_is_none(value: Any) -> None:
    assert pixels_of(value) is None


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


def test_16_bits_are_two_bytes_of_each_channel() -> None:
    values = torch.tensor([0.0, 0.5, 1.0, 1 / 65535, 2.0, -1.0]).reshape(1, 1, 2, 3)
    pixels = pixels_of(values, is_video=False, bit_depth=16)
    assert pixels is not None
    assert (tuple(pixels.frames.shape), pixels.frames.dtype) == ((1, 1, 2, 6), torch.uint8)
    assert pixels.frames.numpy().view(np.uint16).ravel().tolist() == [0, 32768, 65535, 1, 65535, 0]


@pytest.mark.parametrize("value", [PICTURE, CHANNELS_FIRST.to(torch.bfloat16)])
def test_8_bits_arent_taken_for_16(value: Any) -> None:
    with pytest.raises(PipelineFailed, match="so not of bit_depth 16"):
        pixels_of(value, is_video=False, bit_depth=16)
