"""What requests carry: JSON or a form, with pictures as files or URLs."""

import re
from base64 import b64encode
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise
from typing import Any, BinaryIO, TypeVar

import anyio
import msgspec
from anyio.to_thread import run_sync
from PIL import Image, ImageOps
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request

from sgld.errors import InvalidRequest
from sgld.media.images import check_image
from sgld.media.inputs import Reference, replaced
from sgld.server.errors import ApiError
from sgld.server.request_fields import CONTAINERS, in_words

T = TypeVar("T")
# What takes longer than a millisecond is done in a thread.
_LARGE_BYTES = 64 * 1024
_MAX_FILES = 64
MASK = "mask"
# Fields that hold objects; SGLang's clients write them as JSON.
_OBJECTS = frozenset({"cache", "diffusers_kwargs", "lora", *CONTAINERS})
_MAX_FIELDS = 1000
# A field, or an item of a list of such fields.
_LIST = re.compile(r"[^\[]*(\[\d*\])?", re.ASCII)


@dataclass
class Form:
    """A multipart form: its fields, and the sources of its pictures by field name without brackets."""

    fields: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, list[str]] = field(default_factory=dict)


def media_type(request: Request) -> str:
    """The type of the body, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request) -> dict[str, Any]:
    """The object that a request carries.

    :raises ApiError: it says that it carries something else.
    :raises msgspec.DecodeError: it carries something else.
    """
    if media_type(request) not in ("application/json", ""):
        raise ApiError(415, f"the body is {media_type(request)}; send application/json", "unsupported_media_type")
    body = await request.body()
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    return await run_sync(decode, body) if len(body) > _LARGE_BYTES else decode(body)


async def read_form(request: Request, pictures: frozenset[str], *, max_bytes: int, max_pixels: int) -> Form:
    """The form that a request carries.

    Nested fields are written as OpenAI's client does: `lora[scale]` in an object, `sigmas[]` in a list. Inside
    of objects `{"$image": name}` is the file with this name.

    :param pictures: fields that hold pictures, as files or URLs; `mask` is a file.
    :raises ApiError: it carries something else, or a form that can't be read.
    :raises InvalidRequest: a file isn't a picture, or has too many pixels.
    """
    if media_type(request) not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        message = f"the body is {media_type(request) or 'of no type'}; send multipart/form-data"
        raise ApiError(415, message, "unsupported_media_type")
    form = Form()
    files: dict[str, str] = {}
    async with request.form(max_files=_MAX_FILES, max_fields=_MAX_FIELDS, max_part_size=max_bytes) as parts:
        for name, value in parts.multi_items():
            base = name.partition("[")[0]
            if base in pictures and value and _LIST.fullmatch(name):
                form.pictures.setdefault(base, []).append(await _source(name, value, max_pixels))
            elif isinstance(value, UploadFile):
                if name in files:
                    raise InvalidRequest(f"the form gives {name} twice", name)
                files[name] = await _source(name, value, max_pixels)
            elif value:
                _put(form.fields, name, _parsed(value) if base in _OBJECTS else value)
    if files:
        form.fields = _with_files(form.fields, files)
    return form


def _with_files(fields: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
    """The fields with the sources of files in the place of their names.

    :raises InvalidRequest: no picture is expected where one of the files is.
    """
    unused = dict(files)

    def sourced(reference: Reference) -> dict[str, str]:
        unused.pop(reference.source, None)
        return Reference(files.get(reference.source, reference.source), reference.mode).written

    found = {name: replaced(value, sourced) if name in _OBJECTS else value for name, value in fields.items()}
    for name in unused:
        raise InvalidRequest(f"{name} is a file, but no picture is expected there", name)
    return found


async def _source(name: str, value: UploadFile | str, max_pixels: int) -> str:
    """The source of a picture; an upload becomes a data URL, which travels with the params from here on."""
    is_mask = name == MASK
    if isinstance(value, UploadFile):
        return await run_sync(_as_url, name, value.file, max_pixels, is_mask)
    if is_mask:
        raise InvalidRequest("the mask must be sent as a file", name)
    return value


def _as_url(name: str, file: BinaryIO, max_pixels: int, is_mask: bool) -> str:
    content = file.read()
    with in_words({"image_path": name}):
        width, height = check_image(BytesIO(content), name)
    if width * height > max_pixels:
        raise InvalidRequest(f"{name} has {width}x{height} pixels; this server allows at most {max_pixels}", name)
    return data_url(mask_of(content) if is_mask else content)


def data_url(content: bytes) -> str:
    """A source that is the content itself."""
    return f"data:;base64,{b64encode(content).decode()}"


def mask_of(content: bytes) -> bytes:
    """A mask in which white is painted anew, as pipelines want it; in OpenAI's that is what is transparent.

    A mask without transparency is one already.

    :raises InvalidRequest: it is damaged.
    """
    try:
        with Image.open(BytesIO(content)) as mask:
            if not mask.has_transparency_data:
                return content
            buffer = BytesIO()
            ImageOps.invert(mask.convert("RGBA").getchannel("A")).save(buffer, "PNG")
            return buffer.getvalue()
    # Pillow's plugins raise any of these for damaged files.
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidRequest(f"the mask can't be read: {error}", MASK) from None


def _parsed(value: str) -> Any:
    """A value of what nobody knows the type of: a number, a switch, an object, or else text."""
    try:
        return msgspec.json.decode(value)
    except msgspec.DecodeError:
        return value


def _put(fields: dict[str, Any], name: str, value: str) -> None:
    """Add a field to nested objects and lists."""
    base, *keys = name.replace("]", "").split("[")
    path = [base, *keys]
    target: Any = fields
    for key, following in pairwise(path):
        target = target.setdefault(key, [] if following == "" else {})
        if not isinstance(target, list if following == "" else dict):
            raise InvalidRequest(f"the form gives {base} twice, as different things", base)
    if isinstance(target, list):
        target.append(value)
    elif path[-1] in target:
        raise InvalidRequest(f"the form gives {name} twice", base)
    else:
        target[path[-1]] = value


async def unless_gone(request: Request, work: Callable[[], Awaitable[T]]) -> T:
    """What `work` gives; it is cancelled when the client leaves. The body must have been read.

    :raises ClientDisconnect: the client left.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        tasks.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            result = await work()
            tasks.cancel_scope.cancel()
            return result
    except ExceptionGroup as group:
        # There is only one who raises.
        raise group.exceptions[0] from None
    raise ClientDisconnect
