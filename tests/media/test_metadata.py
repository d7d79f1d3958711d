from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sgld.errors import InvalidRequest
from sgld.media.files import ImageFormat
from sgld.media.images import encode_image
from sgld.media.metadata import a1111_text, read_metadata
from sgld.media.videos import write_video

FRAME = np.full((16, 16, 3), 128, np.uint8)
METADATA: dict[str, Any] = {
    "version": "0.1.0",
    "model_path": "black-forest-labs/FLUX.1-dev",
    "params": {
        "prompt": 'Ein Bär 🐻, "熊"\nauf zwei Zeilen\\',
        "negative_prompt": "blurry",
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "seed": 2**63 - 1,
        "width": 1024,
        "height": 768,
        "fps": None,
        "diffusers_kwargs": {"eta": [0.5, True, None]},
    },
}


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp", "avif"])
def test_image_keeps_its_parameters(tmp_path: Path, image_format: ImageFormat) -> None:
    path = tmp_path / "no-ending"
    path.write_bytes(encode_image(FRAME, image_format, metadata=METADATA))
    assert read_metadata(path) == METADATA


def test_video_keeps_its_parameters(tmp_path: Path) -> None:
    path = tmp_path / "no-ending"
    write_video(path, np.stack([FRAME] * 3), fps=8, metadata=METADATA)
    assert read_metadata(path) == METADATA


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp", "avif"])
def test_image_without_parameters_is_refused(tmp_path: Path, image_format: ImageFormat) -> None:
    path = tmp_path / "a"
    path.write_bytes(encode_image(FRAME, image_format))
    with pytest.raises(InvalidRequest, match="holds no parameters of sgld"):
        read_metadata(path)


def test_video_without_parameters_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, FRAME[None], fps=8)
    with pytest.raises(InvalidRequest, match="holds no parameters of sgld"):
        read_metadata(path)


def test_comment_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0holiday"
    Image.fromarray(FRAME).save(path, exif=exif)
    with pytest.raises(InvalidRequest, match="holds no parameters of sgld"):
        read_metadata(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 1000, b"\x89PNG\r\n\x1a\n" + b"x" * 50])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"a\.png"):
        read_metadata(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(InvalidRequest, match="can't be read"):
            read_metadata(path)


def test_parameters_too_long_for_exif_are_refused() -> None:
    metadata = {"params": {"prompt": "x" * 40_000}}
    for image_format in ("jpeg", "webp"):
        with pytest.raises(InvalidRequest, match="holds at most 65533"):
            encode_image(FRAME, image_format, metadata=metadata)
    assert encode_image(FRAME, "png", metadata=metadata)


def test_png_has_the_text_that_others_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode_image(FRAME, "png", metadata=METADATA))
    with Image.open(path) as image:
        assert image.info["parameters"] == a1111_text(METADATA)


def test_a1111_text() -> None:
    params = {**METADATA["params"], "prompt": "a bear"}
    assert a1111_text({**METADATA, "params": params, "model_path": "my, model"}) == (
        "a bear\n"
        "Negative prompt: blurry\n"
        "Steps: 4, CFG scale: 3.5, Seed: 9223372036854775807, Size: 1024x768, "
        'Model: "my, model", Version: sgld 0.1.0'
    )


def test_a1111_text_leaves_out_what_is_unknown() -> None:
    assert a1111_text({"params": {"prompt": "a", "seed": 0, "guidance_scale": None}}) == "a\nSeed: 0"
