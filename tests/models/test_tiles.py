"""Pictures in tiles: whole in the end, and equal to what comes of the picture at once."""

import itertools
from typing import Any

import pytest
import torch

from sgld.models.filters import Upscaler
from sgld.models.super_resolution import Compact, Rrdb
from sgld.models.tiles import FADE, Canvas, overlap_of, spans, weights


@pytest.mark.parametrize("length", [1, 99, 100, 101, 137, 160, 1000, 1003])
@pytest.mark.parametrize(("radius", "multiple"), [(3, 1), (18, 1), (24, 2)])
def test_spans_cover_a_side_and_overlap(length: int, radius: int, multiple: int) -> None:
    parts = spans(length, 100, radius, multiple)
    assert (parts[0].start, parts[-1].stop) == (0, length)
    assert all(part.stop - part.start <= 100 + multiple and part.start % multiple == 0 for part in parts)
    assert all(a.stop - b.start >= 2 * radius + FADE for a, b in itertools.pairwise(parts))


@pytest.mark.parametrize("length", [100, 101, 137, 1003])
def test_weights_add_up_and_leave_out_what_is_spoilt(length: int) -> None:
    parts, radius, scale = spans(length, 100, 9), 9, 2
    total = torch.zeros(length * scale)
    for part, weight in zip(parts, weights(parts, length, radius, scale), strict=True):
        total[part.start * scale : part.stop * scale] += weight
        if part.start:
            assert not weight[: radius * scale - 1].any()
        if part.stop < length:
            assert not weight[-radius * scale + 1 :].any()
    torch.testing.assert_close(total, torch.ones_like(total))


def upscaler(network: Compact | Rrdb, **changed: int) -> Upscaler:
    numbers: dict[str, Any] = {"radius": network.radius, **changed}
    return Upscaler(network, label="", scale=network.scale, multiple=network.multiple, bytes_per_pixel=1, **numbers)


def enlarged(upscaler: Upscaler, picture: torch.Tensor, edge: int) -> tuple[torch.Tensor, int]:
    """The larger picture, and of how many tiles it is made."""
    height, width = picture.shape[1:3]
    scale, size = upscaler.scale, (height * upscaler.scale, width * upscaler.scale)
    given: dict[str, Any] = {"radius": upscaler.radius, "multiple": upscaler.multiple, "scale": scale, "size": size}
    canvas = Canvas(height, width, edge=edge, **given)
    results = [upscaler.decode(picture, canvas, index) for index in range(len(canvas.tiles))]
    assert all(result is None for result in results[:-1])
    assert results[-1] is not None
    return results[-1], len(results)


@pytest.mark.parametrize("channels", [3, 4])
@torch.no_grad()
def test_tiles_of_a_small_network_are_equal_to_the_whole(channels: int) -> None:
    torch.manual_seed(0)
    picture = torch.randint(0, 256, (1, 90, 131, channels), dtype=torch.uint8)
    network = upscaler(Compact(width=8, num_layers=4, scale=2))
    whole, tiled = enlarged(network, picture, 500), enlarged(network, picture, overlap_of(6) + 20)
    assert (whole[1], tiled[1]) == (1, 24)
    assert int((whole[0].int() - tiled[0].int()).abs().max()) <= 1
    spoilt, _ = enlarged(upscaler(network.network, radius=0), picture, overlap_of(6) + 20)  # type: ignore[arg-type]
    assert int((whole[0].int() - spoilt.int()).abs().max()) > 1


@pytest.mark.parametrize("unshuffle", [1, 2])
@torch.no_grad()
def test_tiles_of_rrdb_are_nearly_equal_to_the_whole(unshuffle: int) -> None:
    torch.manual_seed(0)
    picture = torch.randint(0, 256, (1, 75, 140, 3), dtype=torch.uint8)
    network = upscaler(Rrdb(width=4, growth=2, num_blocks=2, num_doublings=unshuffle, unshuffle=unshuffle))
    whole, tiled = enlarged(network, picture, 500), enlarged(network, picture, 96)
    assert tiled[1] > 1
    assert int((whole[0].int() - tiled[0].int()).abs().max()) <= 1


@torch.no_grad()
def test_another_scale_than_the_network_has_is_reached_exactly() -> None:
    network = Compact(width=4, num_layers=1, scale=2)
    picture = torch.full((1, 10, 14, 3), 100, dtype=torch.uint8)
    for weight in network.parameters():
        torch.nn.init.zeros_(weight)
    canvas = Canvas(10, 14, edge=64, radius=3, multiple=1, scale=2, size=(30, 42))
    larger = upscaler(network).decode(picture, canvas, 0)
    assert larger is not None
    assert larger.shape == (1, 30, 42, 3)
    assert bool((larger == 100).all())
