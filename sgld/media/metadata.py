"""How an output says what made it: parameters that are written into the file and read back.

The caller gives a JSON object, `{"version": ..., "model_path": ..., "params": {...}}` with the sampling params; it is
kept whole. Where it is:

    PNG         iTXt chunk `sgld`; chunk `parameters` has the text that A1111, Civitai and others read
    JPEG, WebP, AVIF  EXIF UserComment
    GIF         comment
    MP4, FLAC, WAV  tag `comment`
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import msgspec
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from sgld.errors import InvalidRequest

_PNG_KEY = "sgld"
_PNG_TEXT_KEY = "parameters"
_MP4_KEY = "comment"
_GIF_KEY = "comment"
# EXIF names the encoding in the first eight bytes; "UNICODE" is UTF-16 in practice, big-endian as A1111 writes it.
_UNICODE = b"UNICODE\0"
# An EXIF block is one JPEG segment, whose length has 16 bits.
_MAX_EXIF_BYTES = 65_533

_A1111_NAMES = {
    "num_inference_steps": "Steps",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
}


def a1111_text(metadata: Mapping[str, Any]) -> str:
    """The parameters as stable-diffusion-webui writes them; values that are None or missing are left out.

    Source: https://github.com/AUTOMATIC1111/stable-diffusion-webui, modules/infotext_utils.py.
    """
    params = metadata.get("params", {})
    lines = [str(params.get("prompt", ""))]
    if params.get("negative_prompt"):
        lines.append(f"Negative prompt: {params['negative_prompt']}")
    settings = {name: params.get(field) for field, name in _A1111_NAMES.items()}
    if params.get("width") and params.get("height"):
        settings["Size"] = f"{params['width']}x{params['height']}"
    settings["Model"] = metadata.get("model_path")
    if metadata.get("version") is not None:
        settings["Version"] = f"sgld {metadata['version']}"
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def png_chunks(metadata: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    """The text chunks of a PNG file."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(_PNG_TEXT_KEY, a1111_text(metadata))
    chunks.add_itxt(_PNG_KEY, to_json(metadata))
    return chunks


def exif_block(metadata: Mapping[str, Any]) -> bytes:
    """The EXIF block of a JPEG, WebP or AVIF file.

    :raises InvalidRequest: the parameters don't fit.
    """
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _UNICODE + to_json(metadata).encode("utf-16-be")
    block = exif.tobytes()
    if len(block) > _MAX_EXIF_BYTES:
        raise InvalidRequest(
            f"the parameters take {len(block)} bytes, EXIF holds at most {_MAX_EXIF_BYTES}; choose PNG, or no metadata"
        )
    return block


def mp4_tags(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The tags of an MP4 file."""
    return {_MP4_KEY: to_json(metadata)}


def to_json(metadata: Mapping[str, Any]) -> str:
    """The JSON text that files hold."""
    return msgspec.json.encode(metadata).decode()


def read_metadata(path: Path) -> dict[str, Any]:
    """The JSON object that sgld wrote into a picture or video.

    :raises InvalidRequest: the file isn't there, is neither, or holds no such object.
    """
    text = _read_text(path)
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError:
        raise InvalidRequest(f"the file {str(path)!r} holds no parameters of sgld") from None


def _read_text(path: Path) -> str:
    """Our text in a file, or what is in its place; empty if nothing is."""
    try:
        with Image.open(path) as image:
            match image.format:
                case "PNG":
                    # Pillow gives a subclass of str, which msgspec doesn't take.
                    return str(image.info.get(_PNG_KEY, ""))
                case "GIF":
                    return bytes(image.info.get(_GIF_KEY, b"")).decode(errors="replace")
                case _:
                    return _exif_comment(image)
    except UnidentifiedImageError:
        return _video_comment(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidRequest(f"the file {str(path)!r} can't be read: {error}") from None


def _exif_comment(image: Image.Image) -> str:
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
        return ""
    return comment.removeprefix(_UNICODE).decode("utf-16-be", errors="replace")


def _video_comment(path: Path) -> str:
    try:
        with av.open(str(path)) as container:
            return str(container.metadata.get(_MP4_KEY, ""))
    except (av.FFmpegError, ValueError):
        raise InvalidRequest(f"the file {str(path)!r} is neither a picture nor a video") from None


def _quoted(value: object) -> str:
    """A value as in the list `name: value, name: value`: quoted if it would be mistaken for more of the list."""
    text = str(value)
    return msgspec.json.encode(text).decode() if any(mark in text for mark in ',:\n"') else text
