"""Pictures that requests refer to: where they may come from, and how they reach a rank.

A reference is an entry of `image_path`, or `{"$image": source}` anywhere inside `diffusers_kwargs`; "mode" beside it
(L, RGB or RGBA) says what the pipeline gets, RGB by default. A source is a file, a data URL, or an http(s) URL. The
front turns all into files: what isn't one is put into memory that has a path, and is gone when the request is.
"""

import os
import shutil
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote_to_bytes

import msgspec
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar
from anyio.to_thread import run_sync

from sgld.errors import InvalidRequest
from sgld.media.download import Refused, download
from sgld.media.files import sync
from sgld.media.images import MAX_INPUT_PIXELS, check_image
from sgld.outcome import on_failure
from sgld.sampling_params import SamplingParams

MAX_INPUTS = 64
# So many are read at a time: servers that answer slowly hold their threads, and others are needed for results.
MAX_READERS = 16
_IMAGE, _MODE = "$image", "mode"
_MODES = ("RGB", "RGBA", "L")
Scheme = Literal["data", "http", "file"]
_readers: RunVar[CapacityLimiter] = RunVar("readers")


@dataclass(frozen=True)
class InputPolicy:
    """Where inputs may come from. A server lets its clients neither read its files nor reach its neighbours."""

    allow_files: bool = True
    allow_private_hosts: bool = False
    """Hosts whose address isn't a public one, as this machine and its network."""
    max_bytes: int = 64 * 1024 * 1024
    max_pixels: int = MAX_INPUT_PIXELS
    timeout_s: float = 30.0


@dataclass(frozen=True)
class Reference:
    """One picture that a request refers to, and the mode in which its pipeline gets it."""

    source: str
    mode: str = "RGB"

    @property
    def written(self) -> dict[str, str]:
        """As requests write it."""
        return {_IMAGE: self.source, _MODE: self.mode}


def scheme_of(source: str, policy: InputPolicy) -> Scheme:
    """How a source is read.

    :raises InvalidRequest: the policy forbids it, or it is none.
    """
    scheme = source.partition(":")[0].lower()
    if scheme == "data":
        return "data"
    if scheme in ("http", "https"):
        return "http"
    if "://" in source:
        raise InvalidRequest(f"{shown(source)} can't be read: a picture is a file, a data URL, or an http(s) URL")
    if not policy.allow_files:
        raise InvalidRequest(f"the file {shown(source)} isn't read here; send the picture itself, as a data URL")
    return "file"


def shown(source: str) -> str:
    """A source in a message: data URLs are long."""
    return repr(source if len(source) <= 80 else source[:60] + "...")


def references(value: Any) -> Iterator[Reference]:
    """The references in nested values.

    :raises InvalidRequest: one isn't written as it must be.
    """
    found: list[Reference] = []
    replaced(value, found.append)
    yield from found


def has_pictures(params: SamplingParams) -> bool:
    """Whether a request refers to some; raises as `references`."""
    return bool(params.image_path) or any(references(params.diffusers_kwargs))


def replaced(value: Any, replace: Callable[[Reference], Any]) -> Any:
    """Nested values with something else in the place of each reference.

    :raises InvalidRequest: one isn't written as it must be.
    """
    if isinstance(value, dict):
        if _IMAGE in value:
            return replace(_reference(value))
        return {key: replaced(part, replace) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(replaced(part, replace) for part in value)
    return value


def _reference(value: dict[str, Any]) -> Reference:
    source, mode = value[_IMAGE], value.get(_MODE, "RGB")
    if not isinstance(source, str) or mode not in _MODES or not value.keys() <= {_IMAGE, _MODE}:
        raise InvalidRequest(
            f'a picture is {{"{_IMAGE}": "..."}}, with "{_MODE}" if it isn\'t RGB: {", ".join(_MODES)}',
            "diffusers_kwargs",
        )
    return Reference(source, mode)


@asynccontextmanager
async def as_files(params: SamplingParams, policy: InputPolicy) -> AsyncIterator[SamplingParams]:
    """The params with files in the place of all sources, which can be read as long as the block lasts.

    :raises InvalidRequest: a picture can't be had, or isn't one.
    """
    found = [*map(Reference, params.image_path), *_all_references(params.diffusers_kwargs)]
    if not found:
        yield params
        return
    if len(found) > MAX_INPUTS:
        raise InvalidRequest(f"the request refers to {len(found)} pictures, the limit is {MAX_INPUTS}")
    async with AsyncExitStack() as stack:
        paths: dict[str, str] = {}
        for source in dict.fromkeys(reference.source for reference in found):
            # A thread that waits for a server ends by itself, at its deadline.
            path, close = await run_sync(_as_file, source, policy, abandon_on_cancel=False, limiter=_limiter())
            stack.callback(close)
            paths[source] = path
        yield msgspec.structs.replace(
            params,
            image_path=tuple(paths[source] for source in params.image_path),
            diffusers_kwargs=replaced(params.diffusers_kwargs, lambda r: Reference(paths[r.source], r.mode).written),
        )


def _limiter() -> CapacityLimiter:
    """That of this event loop."""
    try:
        return _readers.get()
    except LookupError:
        _readers.set(limiter := CapacityLimiter(MAX_READERS))
        return limiter


async def kept_in(folder: Path, params: SamplingParams, policy: InputPolicy) -> SamplingParams:
    """The params with copies in a folder in the place of all sources, on the disk; without pictures there is no folder.

    :raises InvalidRequest: a picture can't be had, or isn't one.
    :raises OSError: the folder can't be written.
    """
    async with as_files(params, policy) as readable:
        return await run_sync(_copied_to, folder, readable)


def _copied_to(folder: Path, params: SamplingParams) -> SamplingParams:
    copies: dict[str, str] = {}

    def copy_of(path: str) -> str:
        if path not in copies:
            folder.mkdir(parents=True, exist_ok=True)
            copies[path] = str(folder / str(len(copies)))
            shutil.copyfile(path, copies[path])
            sync(Path(copies[path]))
        return copies[path]

    kwargs = replaced(params.diffusers_kwargs, lambda r: Reference(copy_of(r.source), r.mode).written)
    image_path = tuple(copy_of(path) for path in params.image_path)
    return msgspec.structs.replace(params, image_path=image_path, diffusers_kwargs=kwargs)


def _all_references(value: Any) -> list[Reference]:
    try:
        return list(references(value))
    except RecursionError:
        raise InvalidRequest("diffusers_kwargs is nested too deeply", "diffusers_kwargs") from None


def _as_file(source: str, policy: InputPolicy) -> tuple[str, Callable[[], None]]:
    """The path of a source, and what to call when it isn't needed any more; waits for disks and servers."""
    scheme = scheme_of(source, policy)
    if scheme == "file":
        path = Path(source).absolute()
        _check_size(source, check_image(path), policy)
        return str(path), lambda: None
    content = _decoded(source, policy) if scheme == "data" else _downloaded(source, policy)
    _check_size(source, check_image(BytesIO(content), shown(source)), policy)
    descriptor = _in_memory(content)
    # Not a file on a disk, as whoever dies would leave it there. The rank belongs to the same user.
    return f"/proc/{os.getpid()}/fd/{descriptor}", lambda: os.close(descriptor)


def _check_size(source: str, size: tuple[int, int], policy: InputPolicy) -> None:
    width, height = size
    if width * height > policy.max_pixels:
        raise InvalidRequest(f"{shown(source)} has {width}x{height} pixels; at most {policy.max_pixels} are allowed")


def _in_memory(content: bytes) -> int:
    """The descriptor of an anonymous file with this content."""
    descriptor = os.memfd_create("sgld-input")
    with on_failure(lambda: os.close(descriptor)), open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    return descriptor


def _decoded(source: str, policy: InputPolicy) -> bytes:
    """The content of a data URL. Source: RFC 2397."""
    head, comma, body = source.partition(",")
    if not comma:
        raise InvalidRequest(f"{shown(source)} is no data URL: there is no comma before its data")
    try:
        content = b64decode(body, validate=True) if head.lower().endswith(";base64") else unquote_to_bytes(body)
    except (Base64Error, ValueError) as error:
        raise InvalidRequest(f"the data URL {shown(source)} can't be read: {error}") from None
    if len(content) > policy.max_bytes:
        raise InvalidRequest(f"a picture of {len(content)} bytes is too large; the limit is {policy.max_bytes}")
    return content


def _downloaded(source: str, policy: InputPolicy) -> bytes:
    try:
        return download(
            source,
            max_bytes=policy.max_bytes,
            timeout_s=policy.timeout_s,
            allow_private_hosts=policy.allow_private_hosts,
        )
    except (Refused, OSError) as error:
        raise InvalidRequest(f"{shown(source)} can't be downloaded: {error}") from None
