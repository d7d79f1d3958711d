import weakref
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sgld.errors import InvalidRequest
from sgld.media.animations import AnimationFormat, durations_ms, write_animation
from sgld.media.metadata import read_metadata

FORMATS: tuple[AnimationFormat, ...] = ("gif", "webp")


def brightening(num_frames: int, height: int = 32, width: int = 48) -> NDArray[np.uint8]:
    """A grey ramp, brighter from frame to frame."""
    index, rows, columns = np.mgrid[0:num_frames, 0:height, 0:width]
    return np.stack([rows * 100 // height + columns * 100 // width + index * 5] * 3, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("animation_format", FORMATS)
@pytest.mark.parametrize("size", [(64, 96), (63, 95)])
def test_frames_come_back(tmp_path: Path, animation_format: AnimationFormat, size: tuple[int, int]) -> None:
    path, frames = tmp_path / "a", brightening(5, *size)
    write_animation(path, frames, animation_format, fps=24)

    with Image.open(path) as image:
        assert image.n_frames == 5  # type: ignore[attr-defined]  # of animations
        assert image.info["loop"] == 0
        for index, frame in enumerate(frames):
            image.seek(index)
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - frame).mean() < 8
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("animation_format", FORMATS)
def test_parameters_come_back(tmp_path: Path, animation_format: AnimationFormat) -> None:
    metadata = {"version": "1", "params": {"prompt": "ä" * 1000}}
    write_animation(tmp_path / "a", brightening(3), animation_format, fps=8, metadata=metadata)
    assert read_metadata(tmp_path / "a") == metadata
    write_animation(tmp_path / "a", brightening(3), animation_format, fps=8)
    with pytest.raises(InvalidRequest, match="no parameters of sgld"):
        read_metadata(tmp_path / "a")


def test_quality_makes_a_webp_larger(tmp_path: Path) -> None:
    sizes = []
    for quality in (10, 90):
        write_animation(tmp_path / "a", brightening(3), "webp", fps=8, quality=quality)
        sizes.append((tmp_path / "a").stat().st_size)
    assert sizes[0] < sizes[1]


def test_durations_add_up() -> None:
    assert durations_ms(4, 24, 100) == [40, 40, 40, 50]
    assert sum(durations_ms(240, 24, 100)) == sum(durations_ms(240, 24, 1000)) == 10_000


def test_what_such_pictures_cant_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="at most 50 frames per second, not 60"):
        write_animation(tmp_path / "a", brightening(2), "gif", fps=60)
    with pytest.raises(ValueError, match=r"\(F, H, W, 3\) of uint8"):
        write_animation(tmp_path / "a", np.zeros((4, 4, 3), np.uint8), "gif", fps=8)
    with pytest.raises(InvalidRequest, match="20000x1 can't be written as webp"):
        write_animation(tmp_path / "a", brightening(2, 1, 20_000), "webp", fps=8)
    with pytest.raises(InvalidRequest, match="gif of 32768x4096 has at most 8 frames here, not 9"):
        write_animation(tmp_path / "a", np.broadcast_to(np.zeros(3, np.uint8), (9, 4096, 32768, 3)), "gif", fps=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("animation_format", FORMATS)
def test_pictures_of_frames_are_made_one_at_a_time(
    tmp_path: Path, animation_format: AnimationFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Image.Image]] = []
    largest, from_array = 0, Image.fromarray

    def counted(pixels: NDArray[np.uint8]) -> Image.Image:
        nonlocal largest
        made.append(weakref.ref(image := from_array(pixels)))
        largest = max(largest, sum(ref() is not None for ref in made))
        return image

    monkeypatch.setattr(Image, "fromarray", counted)
    write_animation(tmp_path / "a", brightening(5), animation_format, fps=8)
    assert largest == 1
