"""Pictures: encoding results, loading inputs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, assert_never

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError, features

from sgld.errors import InvalidRequest
from sgld.media.files import ImageFormat
from sgld.media.metadata import exif_block, png_chunks
from sgld.media.png import encode_png

MAX_INPUT_PIXELS = 64_000_000
# From 0 to 10. 1024x1024 on two cores: 0.06 s; with 6 it is 0.3 s, and the file isn't smaller.
_AVIF_SPEED = 8


def encode_image(
    frame: NDArray[np.uint8] | NDArray[np.uint16],
    image_format: ImageFormat,
    *,
    quality: int = 90,
    metadata: Mapping[str, Any] | None = None,
) -> bytes:
    """One picture as the bytes of a file.

    :param frame: (H, W, 3), uint8, RGB, or (H, W, 4) with alpha; a JPEG shows that before white. A PNG of uint16 has 16
        bits for each channel.
    :param quality: 1 to 100, of JPEG, WebP and AVIF; PNG is lossless.
    :param metadata: the parameters to write into it, see `sgld.media.metadata`.
    :raises ValueError: the frame has another shape or dtype.
    :raises InvalidRequest: the metadata doesn't fit, or the format has no pictures of this size.
    """
    check_format(image_format)
    is_deep = frame.dtype == np.uint16 and image_format == "png"
    if not (frame.dtype == np.uint8 or is_deep) or frame.ndim != 3 or frame.shape[2] not in (3, 4):
        raise ValueError(f"a picture is (H, W, 3) of uint8 or has 4 channels, got {frame.shape} of {frame.dtype}")
    if image_format == "png":
        return encode_png(frame, None if metadata is None else png_chunks(metadata))
    try:
        return _save(Image.fromarray(frame), image_format, quality, metadata)
    except (OSError, ValueError) as error:
        height, width, _ = frame.shape
        raise InvalidRequest(f"a picture of {width}x{height} can't be written as {image_format}: {error}") from error


def check_format(image_format: ImageFormat) -> None:
    """:raises InvalidRequest: this Pillow can't write it."""
    if image_format == "avif" and not features.check("avif"):
        message = "the Pillow that is installed can't write AVIF; choose WebP or PNG"
        raise InvalidRequest(message, "output_format")


def _save(
    image: Image.Image, image_format: Literal["jpeg", "webp", "avif"], quality: int, metadata: Mapping[str, Any] | None
) -> bytes:
    buffer = BytesIO()
    match image_format:
        case "jpeg":
            if image.mode == "RGBA":
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            image.save(buffer, "JPEG", quality=quality, exif=_exif(metadata))
        case "webp":
            image.save(buffer, "WEBP", quality=quality, exif=_exif(metadata))
        case "avif":
            image.save(buffer, "AVIF", quality=quality, speed=_AVIF_SPEED, exif=_exif(metadata))
        case _:
            assert_never(image_format)
    return buffer.getvalue()


def _exif(metadata: Mapping[str, Any] | None) -> bytes:
    return b"" if metadata is None else exif_block(metadata)


def load_image(path: Path, mode: str = "RGB") -> Image.Image:
    """An input picture in memory, turned as its EXIF orientation says.

    :param mode: Pillow's name of the channels that it gets; RGB drops transparency.
    :raises InvalidRequest: the file is missing, damaged, no picture, or larger than MAX_INPUT_PIXELS.
    """
    with _opened(path) as image:
        return _in_8_bits(ImageOps.exif_transpose(image)).convert(mode)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits, as depth maps are, in 8: Pillow would clip its values instead."""
    if not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def check_image(source: Path | BytesIO, name: str | None = None) -> tuple[int, int]:
    """Refuse what `load_image` would, as far as the file's header tells, without decoding it.

    :param name: how messages name the source; by default its path.
    :return: width and height in pixels as stored, before the EXIF orientation.
    :raises InvalidRequest: the file is missing, no picture, or larger than MAX_INPUT_PIXELS.
    """
    with _opened(source, name) as image:
        return image.size


def has_alpha(content: bytes) -> bool:
    """Whether an encoded picture has transparency."""
    with _opened(BytesIO(content)) as image:
        return image.has_transparency_data


@contextmanager
def _opened(source: Path | BytesIO, name: str | None = None) -> Iterator[Image.Image]:
    """An image file whose header was read; errors inside the with block are translated, too."""
    name = name or repr(str(source))
    try:
        with Image.open(source) as image:
            width, height = image.size
            if width * height > MAX_INPUT_PIXELS:
                raise InvalidRequest(
                    f"the image {name} has {width}x{height} pixels; at most {MAX_INPUT_PIXELS} are allowed",
                    "image_path",
                )
            yield image
    except FileNotFoundError:
        raise InvalidRequest(f"there is no image {name}", "image_path") from None
    except UnidentifiedImageError:
        raise InvalidRequest(f"the file {name} isn't an image that can be read", "image_path") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidRequest(
            f"the image {name} is too large; at most {MAX_INPUT_PIXELS} pixels are allowed", "image_path"
        ) from None
    # Pillow's plugins raise any of these for damaged files.
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidRequest(f"the image {name} can't be read: {error}", "image_path") from None
