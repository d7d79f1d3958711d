"""From flags, a config file and the metadata of a picture to the settings of a run.

What comes first wins: flags, then the file, then the picture, then the default.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import msgspec.inspect

from sgld.config import EMBEDDED_VIDEO_MODEL, EngineConfig, OutputConfig
from sgld.sampling_params import SamplingParams
from sgld_cli.later import Later, find_later
from sgld_cli.options import HTTP_GROUP, UsageError, as_flag, options, options_by_name
from sgld_cli.sources import read_text

_Struct = TypeVar("_Struct", bound=msgspec.Struct)
# Two spellings of one choice: a source that gives one of them hides both of the sources behind it.
_PROMPT_SOURCES = frozenset({"prompt", "prompt_path"})


@dataclass(frozen=True)
class Setting:
    """A value and where it came from: flag, default, or the name of a file.

    :ivar spelled: its name as the source spelled it, for messages.
    """

    value: Any
    source: str
    spelled: str = field(default="", compare=False)

    def __str__(self) -> str:
        """Its name, with that of its file."""
        return _shown(self.spelled, self.source)


@dataclass(frozen=True)
class Settings:
    """All that a run needs; one SamplingParams per prompt."""

    engine: EngineConfig
    params: tuple[SamplingParams, ...]
    output: OutputConfig


def accept(given: Mapping[str, object], source: str) -> dict[str, Setting]:
    """The settings that a source gives, by option name; with those that come later, as a stronger source may undo them.

    :param given: flags or keys as they were spelled, with their raw values; None stands for the default.
    :param source: "flag", or the name of the file.
    :raises UsageError: a name is unknown, or has a value that it can't have.
    """
    found: dict[str, Setting] = {}
    for spelled, raw in given.items():
        shown = _shown(spelled, source)
        name = _name(spelled, shown)
        if name in found:
            raise UsageError(f"{shown} sets {name}, which is set already; give it once")
        if raw is not None:
            found[name] = Setting(_value(name, raw, shown), source, spelled)
    # No prompts are none given: --print-config prints `prompt: []` beside a prompt_path.
    found = {name: setting for name, setting in found.items() if setting.value or name not in _PROMPT_SOURCES}
    if found.keys() >= _PROMPT_SOURCES:
        raise UsageError("prompt and prompt_path can't be given together; put all prompts in one of them")
    return found


def merge(sources: Iterable[Mapping[str, Setting]]) -> dict[str, Setting]:
    """One setting for every option: that of the first source that has it, else its default.

    :raises UsageError: one of them needs a feature that isn't there yet.
    """
    found: dict[str, Setting] = {}
    for source in sources:
        hidden = _PROMPT_SOURCES if found.keys() & _PROMPT_SOURCES else frozenset()
        found |= {name: setting for name, setting in source.items() if name not in found and name not in hidden}
    for name, setting in found.items():
        _check_supported(name, setting)
    if "model_path" not in found and "num_frames" in found and (found["num_frames"].value or 1) > 1:
        found["model_path"] = Setting(EMBEDDED_VIDEO_MODEL, "default")
    return {option.name: found.get(option.name, Setting(option.default, "default")) for option in options()}


def build(merged: Mapping[str, Setting]) -> Settings:
    """The structs that the settings fill, checked as far as that needs no model.

    :raises UsageError: there is no prompt, or no file of prompts.
    :raises InvalidRequest: an input image is missing or can't be read.
    """
    values = {name: setting.value for name, setting in merged.items()}
    prompts = _prompts(values)
    _check_images(values["image_path"], values["diffusers_kwargs"])
    engine = fill(EngineConfig, values)
    sampling = _of(SamplingParams, values)
    params = tuple(SamplingParams(**{**sampling, "prompt": prompt}) for prompt in prompts)
    return Settings(engine, params, fill(OutputConfig, values))


def fill(struct: type[_Struct], values: Mapping[str, Any]) -> _Struct:
    """The struct whose fields, and those of the structs inside it, have these values; others aren't for it."""
    fields = msgspec.inspect.type_info(struct).fields  # type: ignore[attr-defined]
    inner = {f.name: f.type.cls for f in fields if isinstance(f.type, msgspec.inspect.StructType)}
    return struct(**_of(struct, values), **{name: fill(cls, values) for name, cls in inner.items()})


def _of(struct: type[msgspec.Struct], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in struct.__struct_fields__ if name in values}


def show(merged: Mapping[str, Setting], *, as_json: bool) -> str:
    """The merged settings and where each came from; as YAML, which is a config file again, or as JSON."""
    http = {option.name for option in options() if option.group == HTTP_GROUP}
    shown = {name: setting for name, setting in merged.items() if name not in http}
    if as_json:
        settings = {name: {"value": setting.value, "source": setting.source} for name, setting in shown.items()}
        return msgspec.json.encode(settings).decode()
    # JSON values are YAML values, too.
    return "\n".join(
        f"{name}: {msgspec.json.encode(setting.value).decode()}  # {setting.source}" for name, setting in shown.items()
    )


def refuse_unknown(extras: list[str]) -> None:
    """Refuse arguments that the parser didn't know.

    :raises UsageError: names the first of them.
    """
    for token in extras:
        if token.startswith("--"):
            flag = token.partition("=")[0]
            raise _not_yet(flag, _later(flag, flag))
    if extras:
        raise UsageError(f"{extras[0]!r} belongs to no flag; a prompt goes after --prompt, in quotes")


def _plain(spelled: str) -> str:
    """The name of an option, however it was spelled."""
    return spelled.lstrip("-").replace("-", "_")


def _shown(spelled: str, source: str) -> str:
    """How messages name a setting."""
    return spelled if source == "flag" else f"{spelled} in {source}"


def _name(spelled: str, shown: str) -> str:
    """The name of the option that is meant, or of what comes later.

    :raises UsageError: it is unknown.
    """
    name = _plain(spelled)
    if option := options_by_name().get(name):
        return option.name
    _later(spelled, shown)
    return name


def _value(name: str, raw: object, shown: str) -> object:
    """The value of an option; of what comes later as it was given, since nothing says what it may be."""
    option = options_by_name().get(name)
    if option is None:
        return raw
    try:
        return option.convert(raw)
    except UsageError as error:
        raise UsageError(f"{shown} is {raw!r}: {error}") from None


def _later(spelled: str, shown: str) -> Later:
    """What a name that is no option waits for.

    :raises UsageError: it is unknown; says which name may have been meant.
    """
    name = _plain(spelled)
    later = find_later(name)
    # 0.8: `modle_path` is a slip, `vae_path` is a component's path.
    close = difflib.get_close_matches(name, options_by_name(), n=1, cutoff=0.8 if later else 0.6)
    if later and not (later.is_guess and close):
        return later
    meant = as_flag(close[0]) if close and spelled.startswith("-") else "".join(close)
    raise UsageError(f"{shown} is unknown" + (f"; did you mean {meant}?" if meant else ""))


def _check_supported(name: str, setting: Setting) -> None:
    """Refuse what needs a feature that isn't there yet, unless its value only states what is done anyway.

    :raises UsageError: names the setting as it was spelled, and the feature.
    """
    option = options_by_name().get(name)
    if option is None:
        later = _later(setting.spelled, str(setting))
        if _said(setting.value) not in later.today:
            raise _not_yet(str(setting), later)
    elif option.later and setting.value != option.default:
        raise UsageError(
            f"{setting} is {setting.value}: that isn't supported yet ({option.later}); leave it at {option.default}"
        )


def _not_yet(shown: str, later: Later) -> UsageError:
    return UsageError(f"{shown} isn't supported yet ({later.feature})")


def _said(raw: object) -> str:
    """A value in the spelling of the table of later flags; a flag without a value says true."""
    if isinstance(raw, list):
        return ",".join(map(str, raw)).lower() or "true"
    return str(raw).lower()


def _prompts(values: Mapping[str, Any]) -> tuple[str, ...]:
    prompts: tuple[str, ...] = values["prompt"]
    if values["prompt_path"] is not None:
        path = Path(values["prompt_path"])
        prompts = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
        if not prompts:
            raise UsageError(f"{path} holds no prompt")
    if not prompts and not values["image_path"]:
        raise UsageError("there is no prompt: give --prompt or --prompt-path (a model that takes none: --prompt '')")
    return prompts or ("",)


def _check_images(sources: Sequence[str], kwargs: Mapping[str, Any]) -> None:
    """See that input images are there, as far as that takes no download."""
    if not sources and not kwargs:
        return
    from sgld.media.images import check_image  # loads Pillow: only for requests with images
    from sgld.media.inputs import InputPolicy, references, scheme_of

    for source in (*sources, *(reference.source for reference in references(kwargs))):
        if scheme_of(source, InputPolicy()) == "file":
            check_image(Path(source))
