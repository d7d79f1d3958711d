from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from sgld.errors import InvalidRequest
from sgld.media import images
from sgld.media.files import ImageFormat
from sgld.media.images import check_image, encode_image, load_image
from sgld.media.metadata import read_metadata


def gradient(height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, columns * 255 // width, rows + columns], axis=-1).astype(np.uint8)


def decoded(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


def test_png_is_lossless() -> None:
    np.testing.assert_array_equal(decoded(encode_image(gradient(), "png")), gradient())


@pytest.mark.parametrize("num_channels", [3, 4])
def test_png_may_have_16_bits(tmp_path: Path, num_channels: int) -> None:
    frame = np.random.default_rng(0).integers(0, 65_536, (7, 5, num_channels)).astype(np.uint16)
    path = tmp_path / "a.png"
    path.write_bytes(encode_image(frame, "png", metadata={"params": {"prompt": "ä"}}))
    with av.open(str(path)) as container:
        (read,) = container.decode(video=0)
    assert read.format.name == ("rgb48be" if num_channels == 3 else "rgba64be")
    np.testing.assert_array_equal(read.to_ndarray(), frame)
    assert read_metadata(path) == {"params": {"prompt": "ä"}}
    with Image.open(path) as image:
        image.verify()
    with pytest.raises(ValueError, match="of uint8"):
        encode_image(frame, "webp")


@pytest.mark.parametrize("image_format", ["jpeg", "webp", "avif"])
def test_lossy_formats_are_close_and_quality_counts(image_format: ImageFormat) -> None:
    good, poor = (encode_image(gradient(), image_format, quality=quality) for quality in (95, 10))
    assert np.abs(decoded(good).astype(int) - gradient()).mean() < 4
    assert len(poor) < len(good)
    assert Image.open(BytesIO(good)).format == image_format.upper()


@pytest.mark.parametrize("frame", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4, 3))])
def test_other_arrays_are_refused(frame: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match=r"\(H, W, 3\) of uint8"):
        encode_image(frame, "png")


def test_a_format_that_pillow_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.features.check", lambda feature: False)
    with pytest.raises(InvalidRequest, match="can't write AVIF; choose WebP or PNG"):
        encode_image(gradient(), "avif")


def test_picture_that_the_format_cannot_hold_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="20000x1 can't be written as webp"):
        encode_image(np.zeros((1, 20_000, 3), np.uint8), "webp")


def test_image_is_turned_by_its_orientation(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(gradient()).save(path, exif=exif)
    assert check_image(path) == (64, 48)
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.rot90(gradient(), -1))


def test_grey_of_16_bits_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "depth.png")
    assert np.asarray(load_image(tmp_path / "depth.png", "L")).tolist() == [[0, 0, 1, 128, 255]]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_any_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.tiff"
    Image.fromarray(gradient()).convert(mode).save(path)
    image = load_image(path)
    assert image.mode == "RGB"
    assert image.size == (64, 48)


@pytest.mark.parametrize("function", [load_image, check_image])
def test_what_is_no_image_is_refused(tmp_path: Path, function: object) -> None:
    assert callable(function)
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    with pytest.raises(InvalidRequest, match=r"no image .*missing\.png"):
        function(tmp_path / "missing.png")
    for name in ("text.png", "empty.png"):
        with pytest.raises(InvalidRequest, match=f"{name}.* isn't an image"):
            function(tmp_path / name)
    with pytest.raises(InvalidRequest, match="can't be read"):
        function(tmp_path)
    with pytest.raises(InvalidRequest, match="can't be read"):
        function(Path("a\0.png"))


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_cut_off_image_is_refused(tmp_path: Path, image_format: ImageFormat) -> None:
    path = tmp_path / "a"
    path.write_bytes(encode_image(gradient(256, 256), image_format)[:-200])
    with pytest.raises(InvalidRequest, match="image"):
        load_image(path)


def test_too_large_image_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode_image(gradient(), "png"))
    monkeypatch.setattr(images, "MAX_INPUT_PIXELS", 64 * 48 - 1)
    for function in (load_image, check_image):
        with pytest.raises(InvalidRequest, match="64x48 pixels; at most 3071"):
            function(path)


def test_decompression_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (20_000, 10_000)).save(path)
    with pytest.raises(InvalidRequest, match="at most 64000000"):
        check_image(path)


@pytest.mark.parametrize("image_format", ["png", "webp", "avif"])
def test_transparency_is_kept(image_format: ImageFormat) -> None:
    frame = np.dstack([gradient(), np.full((48, 64), 128, np.uint8)])
    image = Image.open(BytesIO(encode_image(frame, image_format)))
    assert image.mode == "RGBA"
    assert abs(int(np.asarray(image)[10, 10, 3]) - 128) <= 2


def test_transparency_is_white_where_the_format_has_none() -> None:
    frame = np.dstack([np.zeros((48, 64, 3), np.uint8), np.full((48, 64), 51, np.uint8)])
    assert np.abs(decoded(encode_image(frame, "jpeg")).astype(int) - 204).max() <= 2
