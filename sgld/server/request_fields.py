"""Fields of requests for pictures and for videos: under which names they come, and which are refused.

A field is one of the options of its endpoint, or one of SamplingParams under the same name. Others are refused, with
the name that may have been meant, except those of the two tables below.
"""

import difflib
import re
import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from sgld.encoding import OutputQuality, quality_of
from sgld.errors import InvalidRequest
from sgld.sampling_params import MAX_SEED, SamplingParams
from sgld.server.errors import ApiError

_Struct = TypeVar("_Struct", bound=msgspec.Struct)
_Options = TypeVar("_Options", bound="FileOptions")

# Accepted and without effect: what concerns OpenAI's accounts and models.
IGNORED = frozenset({"moderation", "style", "user", "safety_identifier", "complexity", "input_fidelity"})
# SGLang's, whose features aren't there: accepted with the values that only state what is done anyway.
_LATER: dict[str, tuple[object, ...]] = {
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
_SIZE_PATTERN = "^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
MAX_RANDOM_SEED = 2**31


class FileOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields that aren't sampling params, of requests for files of any kind."""

    model: Annotated[str | None, Meta(description="any name is accepted; the server has one model")] = None
    n: Annotated[int, Meta(ge=1, description="number of outputs")] = 1
    size: Annotated[str, Meta(description="auto, or WIDTHxHEIGHT", extra_json_schema={"pattern": _SIZE_PATTERN})] = (
        "auto"
    )
    seed: (
        Annotated[
            Annotated[int, Meta(ge=0, le=MAX_SEED)] | list[int],
            Meta(description="seed of the first output, or one for each, counting up; by default a random one"),
        ]
        | None
    ) = None
    output_compression: (
        Annotated[int, Meta(ge=0, le=100, description="quality of what isn't a PNG; 100 is the best")] | None
    ) = None
    output_quality: Annotated[OutputQuality | None, Meta(description="the same, in SGLang's words")] = None
    metadata: Annotated[bool, Meta(description="embed the parameters into the files")] = True

    @property
    def encoding_quality(self) -> int:
        return quality_of(self.output_quality, self.output_compression)


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


def understood(
    fields: Mapping[str, Any], options: type[_Options], names: frozenset[str], *, is_form: bool
) -> tuple[_Options, dict[str, Any]]:
    """The options of a request, and its sampling params as builtin types, under their own names.

    :param names: of the sampling params of this endpoint.
    :raises ApiError: a field is unknown, or not served.
    :raises InvalidRequest: a field has a value that it can't have.
    :raises msgspec.ValidationError: a field has another type.
    """
    rest = dict(_known(fields, {*names, *options.__struct_fields__}))
    sampling = {name: rest.pop(name) for name in names & rest.keys()}
    chosen = convert(rest, options, is_form)
    size = _size_of(chosen.size, sampling)
    return chosen, {**sampling, **size, "num_outputs_per_prompt": chosen.n, "seed": _seed_of(chosen.seed, chosen.n)}


def _known(fields: Mapping[str, Any], ours: Collection[str]) -> Iterator[tuple[str, Any]]:
    """The fields that count, under their own names; null is as if nothing were given."""
    for given, value in fields.items():
        name = _ALIASES.get(given, given)
        if name in ours:
            if value is not None:
                yield name, value
        elif name in _LATER:
            if value is not None and value not in _LATER[name]:
                raise ApiError(400, f"{name} isn't supported yet", "unsupported_parameter", param=name)
        elif name not in IGNORED:
            close = difflib.get_close_matches(name, ours, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ApiError(400, f"there is no parameter {name!r}{hint}", "unknown_parameter", param=name)


def _size_of(size: str, sampling: Mapping[str, Any]) -> dict[str, int]:
    if size == "auto":
        return {}
    match = _SIZE.fullmatch(size)
    if match is None:
        raise InvalidRequest(f"size is {size!r}; it must be auto, or as 1024x768", "size")
    chosen = {"width": int(match[1]), "height": int(match[2])}
    if any(str(sampling.get(name, side)) != str(side) for name, side in chosen.items()):
        raise InvalidRequest(f"size is {size}, but width or height say something else; give one of them", "size")
    return chosen


def _seed_of(given: int | list[int] | None, n: int) -> int:
    """The seed of the first output; output i has seed + i."""
    if given is None:
        return secrets.randbelow(MAX_RANDOM_SEED)
    if isinstance(given, int):
        return given
    if not given or given != list(range(given[0], given[0] + n)):
        raise InvalidRequest(f"seed is {given}; a list must count up, one for each of the {n} outputs", "seed")
    return given[0]
