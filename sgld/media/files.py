"""Where outputs are put: their names, their formats, and writing them so that nobody sees half a file."""

import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Literal

from sgld.errors import InvalidRequest

ImageFormat = Literal["png", "jpeg", "webp", "avif"]
VideoFormat = Literal["mp4", "gif", "webp"]
MediaFormat = Literal["png", "jpeg", "webp", "avif", "gif", "mp4", "wav", "flac"]
Content = bytes | Callable[[Path], None]
"""What a file shall contain, or a function that writes it to a path."""

FORMATS: dict[str, MediaFormat] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
    ".avif": "avif",
    ".gif": "gif",
    ".mp4": "mp4",
    ".wav": "wav",
    ".flac": "flac",
}
_EXTENSIONS: dict[MediaFormat, str] = {
    "png": ".png",
    "jpeg": ".jpg",
    "webp": ".webp",
    "avif": ".avif",
    "gif": ".gif",
    "mp4": ".mp4",
    "wav": ".wav",
    "flac": ".flac",
}

_MEDIA_TYPES: dict[MediaFormat, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "avif": "image/avif",
    "gif": "image/gif",
    "mp4": "video/mp4",
    "wav": "audio/wav",
    "flac": "audio/flac",
}

_MAX_PROMPT_CHARACTERS = 100
# File names have at most 255 bytes; 100 characters may be 400. This leaves room for time, hash, number and ending.
_MAX_PROMPT_BYTES = 180


def format_of(name: str) -> MediaFormat:
    """The format that a file name asks for by its ending.

    :raises InvalidRequest: the ending isn't one of ours.
    """
    ending = Path(name).suffix.lower()
    if ending not in FORMATS:
        raise InvalidRequest(f"the file name {name!r} must end in one of {', '.join(FORMATS)}", "output_file_name")
    return FORMATS[ending]


def extension_of(media_format: MediaFormat) -> str:
    """The usual ending of a format, with its dot."""
    return _EXTENSIONS[media_format]


def media_type_of(media_format: MediaFormat) -> str:
    """What HTTP calls a format."""
    return _MEDIA_TYPES[media_format]


def file_name(prompt: str, seed: int, media_format: MediaFormat, now: datetime) -> str:
    """The default name of an output: the prompt's beginning, the time, eight digits of a hash, the ending.

    Written with `write_unique`: equal requests within a second get equal names.
    """
    slug = re.sub(r"\W+", "_", prompt[:_MAX_PROMPT_CHARACTERS]).strip("_")
    slug = slug.encode(errors="ignore")[:_MAX_PROMPT_BYTES].decode(errors="ignore")
    digest = hashlib.sha256(f"{prompt}\0{seed}".encode(errors="replace")).hexdigest()[:8]
    parts = [slug, f"{now:%Y%m%d-%H%M%S}", digest]
    return "_".join(part for part in parts if part) + extension_of(media_format)


def resolve_output(folder: Path, name: str) -> Path:
    """The path of the output `name` in `folder`; folders below it are allowed, paths out of it aren't.

    :raises InvalidRequest: the name leads out of the folder, also through a symbolic link, or can't be a file's.
    """
    # Backslashes and drive letters mean nothing here, but would where the file is copied to.
    if not name or not name.isprintable() or "\\" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise _bad_name(name, "it must be a plain relative path without '..', '\\' and control characters")
    root = folder.resolve()
    try:
        path = (root / name).resolve()
        is_folder = path.is_dir()
    except (OSError, RuntimeError) as error:
        raise _bad_name(name, str(error)) from None
    if is_folder or name.endswith("/"):
        raise _bad_name(name, "it is a folder")
    if not path.is_relative_to(root):
        raise _bad_name(name, "it leads out of the output folder")
    return path


def write_atomically(path: Path, content: Content, *, is_durable: bool = False) -> None:
    """Write a file that appears whole or not at all, in place of one that may be there.

    :param is_durable: it is forced to the disk; else it may be missing or empty after a power failure.
    :raises OSError: it can't be written; nothing of it is left.
    """
    with _temporary(path, content) as temporary:
        if is_durable:
            sync(temporary)
        temporary.replace(path)
    if is_durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_unique(path: Path, content: Content) -> Path:
    """`write_atomically` to `path`, or where that exists to `<stem>-1<ending>`, `<stem>-2<ending>` and so on.

    :return: the path that was written.
    """
    with _temporary(path, content) as temporary:
        unique = _reserve(path)
        temporary.replace(unique)
    return unique


@contextmanager
def _temporary(path: Path, content: Content) -> Iterator[Path]:
    """A new file beside `path`, hence in the same file system; it is moved in the block, or removed after it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            content(temporary)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _reserve(path: Path) -> Path:
    """Make an empty file that wasn't there: `path`, or `path` with a number."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in count(1))
    return next(candidate for candidate in chain([path], numbered) if _create(candidate))


def _create(path: Path) -> bool:
    """Make an empty file; whether none was there."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        return False
    return True


def _bad_name(name: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"the file name {name!r} can't be used: {reason}", "output_file_name")
