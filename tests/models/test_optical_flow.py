"""Frames between frames, on motion that is known."""

import pytest
import torch
from torch.nn import functional

from sgld.models.optical_flow import OpticalFlow

NOISE = torch.rand(1, 3, 24, 28, generator=torch.Generator().manual_seed(0))
TEXTURE = functional.interpolate(NOISE, (120, 140), mode="bicubic").clamp(0, 1)


def moved(x: int, y: int) -> torch.Tensor:
    """A window of a picture that moves."""
    return TEXTURE[:, :, 20 + y : 84 + y, 20 + x : 100 + x]


def psnr(frame: torch.Tensor, expected: torch.Tensor) -> float:
    return -10 * float(torch.log10(((frame - expected) ** 2).mean()))


@pytest.mark.parametrize(("time", "x", "y", "least"), [(0.5, 4, 2, 35), (0.25, 2, 1, 29)])
def test_frame_lies_where_motion_is_at_its_time(time: float, x: int, y: int, least: float) -> None:
    first, last, expected = moved(0, 0), moved(8, 4), moved(x, y)
    between = OpticalFlow()(first, last, time)
    assert psnr(between, expected) > least
    assert psnr((1 - time) * first + time * last, expected) < 25


def test_what_does_not_move_stays() -> None:
    torch.testing.assert_close(OpticalFlow()(moved(0, 0), moved(0, 0), 0.5), moved(0, 0))


def test_motion_is_estimated_at_another_resolution() -> None:
    assert psnr(OpticalFlow()(moved(0, 0), moved(8, 4), 0.5, scale=0.5), moved(4, 2)) > 28


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (9, 40)])
def test_small_frames_are_no_problem(size: tuple[int, int]) -> None:
    first, last = torch.rand(2, 1, 3, *size, generator=torch.Generator().manual_seed(0))
    between = OpticalFlow()(first, last, 0.5)
    assert between.shape == first.shape
    assert bool(between.isfinite().all())
