"""What clients send and get, under OpenAI's names and SGLang's, and its translation into SamplingParams.

A field is one of ours (`ImageOptions`), or one of SamplingParams under the same name. Others are refused, with the name
that may have been meant, except those of the two tables below.
"""

import difflib
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from sgld.encoding import OutputQuality, quality_of
from sgld.errors import InvalidRequest
from sgld.media.files import ImageFormat
from sgld.sampling_params import MAX_SEED, SamplingParams
from sgld.server.errors import ApiError
from sgld.storage import Upload

_Struct = TypeVar("_Struct", bound=msgspec.Struct)

# Accepted and without effect: what concerns OpenAI's accounts and models.
IGNORED = frozenset({"moderation", "style", "user", "safety_identifier", "complexity", "input_fidelity"})
# SGLang's, whose features aren't there: accepted with the values that only state what is done anyway.
LATER: dict[str, tuple[object, ...]] = {
    "enhance_prompt": (False,),
    "task_type": (),
    "enable_teacache": (False,),
    "enable_cache_dit": (False,),
    "profile": (False,),
    "perf_dump_path": (),
    "video_reference": (),
    "video_url": (),
    "video_path": (),
}
# Objects inside which SGLang's clients send further fields.
CONTAINERS = ("extra_body", "extra_json", "extra_args", "extra_params")
# What the API says in other words, or the server decides.
_OWN_WORDS = frozenset({"image_path", "num_previews", "num_outputs_per_prompt", "num_frames", "fps", "seed"})
INTERPOLATION_FIELDS = frozenset(name for name in SamplingParams.__struct_fields__ if "frame_interpolation" in name)
"""Of videos only."""
SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__) - _OWN_WORDS - INTERPOLATION_FIELDS
_ALIASES = {"num_outputs": "n", "num_outputs_per_prompt": "n"}
# Sampling params that follow from a field of another name.
_SAID_AS = {
    "num_outputs_per_prompt": "n",
    "width": "size",
    "height": "size",
    "num_previews": "partial_images",
    "num_frames": "seconds",
}
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)
SIZE_PATTERN = "^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
PartialType = Literal["image_generation.partial_image", "image_edit.partial_image"]
CompletedType = Literal["image_generation.completed", "image_edit.completed"]
MAX_RANDOM_SEED = 2**31


class ImageOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of requests for pictures that aren't sampling params."""

    model: Annotated[str | None, Meta(description="any name is accepted; the server has one model")] = None
    n: Annotated[int, Meta(ge=1, description="number of pictures")] = 1
    size: Annotated[str, Meta(description="auto, or WIDTHxHEIGHT", extra_json_schema={"pattern": SIZE_PATTERN})] = (
        "auto"
    )
    seed: (
        Annotated[
            Annotated[int, Meta(ge=0, le=MAX_SEED)] | list[int],
            Meta(description="seed of the first picture, or one for each, counting up; by default a random one"),
        ]
        | None
    ) = None
    quality: Annotated[
        Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"],
        Meta(description="without effect: choose num_inference_steps"),
    ] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    output_format: Annotated[Literal["png", "jpeg", "jpg", "webp", "avif"], Meta(description="format of the file")] = (
        "png"
    )
    output_compression: (
        Annotated[int, Meta(ge=0, le=100, description="quality of JPEG, WebP and AVIF; 100 is the best")] | None
    ) = None
    output_quality: Annotated[OutputQuality | None, Meta(description="the same, in SGLang's words")] = None
    response_format: Annotated[Literal["b64_json", "url"], Meta(description="the picture itself, or where it is")] = (
        "b64_json"
    )
    stream: Annotated[bool | None, Meta(description="answer with server-sent events")] = None
    partial_images: Annotated[int, Meta(ge=0, le=3, description="previews in the stream")] | None = None
    progress_events: Annotated[bool, Meta(description="steps in the stream, too; OpenAI's clients don't know them")] = (
        False
    )
    metadata: Annotated[bool, Meta(description="embed the parameters into the files")] = True
    wait: Annotated[
        bool,
        Meta(description="false: answer at once; /v1/requests/ID tells how far it is"),
    ] = True
    num_previews: Annotated[
        int, Meta(ge=0, le=100, description="previews for those who watch /v1/events, where there is no stream")
    ] = 0

    @property
    def format(self) -> ImageFormat:
        return "jpeg" if self.output_format == "jpg" else self.output_format

    @property
    def encoding_quality(self) -> int:
        return quality_of(self.output_quality, self.output_compression)


class ImageRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request for pictures, understood.

    :param words: what the client called fields that have other names here.
    """

    options: ImageOptions
    params: SamplingParams
    words: Mapping[str, str]


class TokenDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Part of `Usage`."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What OpenAI's clients expect; nothing is counted here, as nothing is charged."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int = 0
    total_tokens: int = 0


class ImageData(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One picture: itself, or its URL."""

    seed: int
    b64_json: bytes | None = None
    url: str | None = None
    upload: Upload | None = None


class ImagesResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a request for pictures."""

    id: str
    created: int
    data: list[ImageData]
    output_format: ImageFormat
    size: str
    background: Literal["opaque", "transparent"]
    usage: Usage = Usage()
    inference_time_s: float


class PartialImage(msgspec.Struct, frozen=True, kw_only=True):
    """An event of the stream: what the picture is going to be. `index` says of which, where there are several."""

    type: PartialType
    b64_json: bytes
    partial_image_index: int
    created_at: int
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque", "transparent"] = "opaque"
    output_format: ImageFormat
    index: int


class CompletedImage(msgspec.Struct, frozen=True, kw_only=True):
    """An event of the stream: a picture."""

    type: CompletedType
    b64_json: bytes
    created_at: int
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque", "transparent"]
    output_format: ImageFormat
    usage: Usage = Usage()
    index: int
    seed: int
    id: str
    upload: Upload | None = None


def image_request(
    given: Mapping[str, Any], *, images: tuple[str, ...] = (), mask: str | None = None, is_form: bool = False
) -> ImageRequest:
    """Understand the fields of a request for pictures.

    :param images: sources of the input pictures.
    :param mask: source of the mask.
    :param is_form: numbers and switches are strings.
    :raises ApiError: a field is unknown, or not served.
    :raises InvalidRequest: a field has a value that it can't have.
    :raises msgspec.ValidationError: a field has another type.
    """
    fields = unpacked(given)
    words = words_of(fields, "image")
    with in_words(words):
        return _image_request(fields, images, mask, is_form, words)


def _image_request(
    given: Mapping[str, Any], images: tuple[str, ...], mask: str | None, is_form: bool, words: Mapping[str, str]
) -> ImageRequest:
    fields = dict(known(given, ImageOptions))
    sampling = {name: fields.pop(name) for name in SAMPLING_FIELDS & fields.keys()}
    options = convert(fields, ImageOptions, is_form)
    if options.stream and not options.wait:
        raise InvalidRequest("a stream is a way to wait: choose stream, or wait: false", "wait")
    if "prompt" not in sampling and not images:
        raise InvalidRequest("there is no prompt", "prompt")
    sampling |= size_of(options.size, sampling)
    previews = options.partial_images or 0 if options.stream else options.num_previews
    # A video model gives a picture when it makes one frame; others take no notice.
    sampling |= {"num_outputs_per_prompt": options.n, "num_frames": 1, "num_previews": previews}
    sampling |= {"seed": seed_of(options.seed, options.n), "image_path": images}
    params = convert(sampling, SamplingParams, is_form)
    if params.bit_depth == 16 and options.format != "png":
        raise InvalidRequest(f"bit_depth is 16: {options.format} has 8 bits; choose png", "bit_depth")
    if mask is not None:
        kwargs = {**params.diffusers_kwargs, "mask_image": {"$image": mask, "mode": "L"}}
        params = msgspec.structs.replace(params, diffusers_kwargs=kwargs)
    return ImageRequest(options=options, params=params, words=words)


def words_of(given: Mapping[str, Any], picture: str) -> dict[str, str]:
    """What the client called the fields that have other names here.

    :param picture: what it calls an input picture.
    """
    words = {"image_path": picture} | {name: alias for alias, name in _ALIASES.items() if alias in given}
    said = {ours: words.get(name, name) for ours, name in _SAID_AS.items() if ours not in given}
    return words | {ours: name for ours, name in said.items() if name in given}


@contextmanager
def in_words(words: Mapping[str, str]) -> Iterator[None]:
    """Name fields in errors as the client did."""

    def said(text: str) -> str:
        return re.sub(r"\w+", lambda found: words.get(found[0], found[0]), text)

    try:
        yield
    except msgspec.ValidationError as error:
        raise msgspec.ValidationError(said(str(error))) from None
    except InvalidRequest as error:
        if error.param is None or error.param not in words:
            raise
        raise InvalidRequest(said(str(error)), words[error.param]) from None


def convert(fields: Mapping[str, Any], struct: type[_Struct], is_form: bool) -> _Struct:
    return msgspec.convert(fields, struct, strict=not is_form)


def unpacked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with those inside SGLang's containers, which count less."""
    fields: dict[str, Any] = {}
    for name in CONTAINERS:
        inner = given.get(name) or {}
        if not isinstance(inner, dict):
            raise InvalidRequest(f"{name} must be an object", name)
        fields |= inner
    return fields | {name: value for name, value in given.items() if name not in CONTAINERS}


def known(
    fields: Mapping[str, Any], options: type[msgspec.Struct], sampling: frozenset[str] = SAMPLING_FIELDS
) -> Iterator[tuple[str, Any]]:
    """The fields that count, under their own names; null is as if nothing were given.

    :param options: has the fields of this endpoint that aren't sampling params.
    """
    ours = sampling | set(options.__struct_fields__)
    for given, value in fields.items():
        name = _ALIASES.get(given, given)
        if name in ours:
            if value is not None:
                yield name, value
        elif name in LATER:
            if value is not None and value not in LATER[name]:
                raise ApiError(400, f"{name} isn't supported yet", "unsupported_parameter", param=name)
        elif name not in IGNORED:
            close = difflib.get_close_matches(name, ours, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ApiError(400, f"there is no parameter {name!r}{hint}", "unknown_parameter", param=name)


def size_of(size: str, sampling: Mapping[str, Any]) -> dict[str, int]:
    if size == "auto":
        return {}
    match = _SIZE.fullmatch(size)
    if match is None:
        raise InvalidRequest(f"size is {size!r}; it must be auto, or as 1024x768", "size")
    chosen = {"width": int(match[1]), "height": int(match[2])}
    if any(str(sampling.get(name, side)) != str(side) for name, side in chosen.items()):
        raise InvalidRequest(f"size is {size}, but width or height say something else; give one of them", "size")
    return chosen


def seed_of(given: int | list[int] | None, n: int) -> int:
    """The seed of the first output; output i has seed + i."""
    if given is None:
        return secrets.randbelow(MAX_RANDOM_SEED)
    if isinstance(given, int):
        return given
    if not given or given != list(range(given[0], given[0] + n)):
        raise InvalidRequest(f"seed is {given}; a list must count up, one for each of the {n} pictures", "seed")
    return given[0]
