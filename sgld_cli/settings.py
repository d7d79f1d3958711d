"""From flags, a config file and the metadata of a picture to the settings of a run.

What comes first wins: flags, then the file, then the picture, then the default.
"""

import argparse
import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import msgspec.inspect

from sgld.config import EMBEDDED_VIDEO_MODEL, EngineConfig, OutputConfig
from sgld.engine.loras import of_config
from sgld.sampling_params import SamplingParams
from sgld_cli.later import COMPONENT_PATH, LATER, Later, find_later
from sgld_cli.options import HTTP_GROUP, UsageError, as_flag, options, options_by_name
from sgld_cli.sources import read_config, read_text

_Struct = TypeVar("_Struct", bound=msgspec.Struct)
# Two spellings of one choice: a source that gives one of them hides both of the sources behind it.
_PROMPT_SOURCES = frozenset({"prompt", "prompt_path"})
# Each component's path is a setting of its own, so that each source can choose some.
_COMPONENTS = "component_paths."


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
    for spelled, raw in _each_component(given, source):
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


def given(args: argparse.Namespace) -> Iterator[dict[str, Setting]]:
    """What the flags of a command and its config file give, the strongest source first; raises what `accept` does."""
    yield accept(vars(args).get("given", {}), "flag")
    if args.config:
        yield accept(read_config(Path(args.config)), args.config)


def merge(sources: Iterable[Mapping[str, Setting]]) -> dict[str, Setting]:
    """One setting for every option: that of the first source that has it, else its default.

    :raises UsageError: one of them needs a feature that isn't there yet.
    """
    found: dict[str, Setting] = {}
    for source in sources:
        hidden = _PROMPT_SOURCES if found.keys() & _PROMPT_SOURCES else frozenset()
        found |= {name: setting for name, setting in source.items() if name not in found and name not in hidden}
    components = {name: found.pop(name) for name in list(found) if name.startswith(_COMPONENTS)}
    if components:
        paths = {name.removeprefix(_COMPONENTS): setting.value for name, setting in components.items()}
        named = ", ".join(dict.fromkeys(setting.source for setting in components.values()))
        found["component_paths"] = Setting(paths, named, "component_paths")
    for name, setting in found.items():
        _check_supported(name, setting)
    if "model_path" not in found and "num_frames" in found and (found["num_frames"].value or 1) > 1:
        found["model_path"] = Setting(EMBEDDED_VIDEO_MODEL, "default")
    return {option.name: found.get(option.name, Setting(option.default, "default")) for option in options()}


def build(merged: Mapping[str, Setting]) -> Settings:
    """The structs that the settings fill, checked as far as that needs no model.

    :raises UsageError: there is no prompt, or no file of prompts.
    :raises InvalidRequest: an input image is missing or can't be read, or no adapter has such a nickname.
    """
    values = {name: setting.value for name, setting in merged.items()}
    prompts = _prompts(values)
    _check_images(values["image_path"], values["diffusers_kwargs"])
    engine = fill(EngineConfig, values)
    sampling = _of(SamplingParams, values)
    # Named here, so that the files say what made them.
    sampling["lora"] = of_config(engine.adapters).resolved(sampling["lora"]) or sampling["lora"]
    params = tuple(SamplingParams(**{**sampling, "prompt": prompt}) for prompt in prompts)
    return Settings(engine, params, fill(OutputConfig, values))


def fill(struct: type[_Struct], values: Mapping[str, Any]) -> _Struct:
    """The struct whose fields, and those of the structs inside it, have these values; others aren't for it."""
    fields = msgspec.inspect.type_info(struct).fields  # type: ignore[attr-defined]
    inner = {f.name: f.type.cls for f in fields if isinstance(f.type, msgspec.inspect.StructType)}
    return struct(**_of(struct, values), **{name: fill(cls, values) for name, cls in inner.items()})


def _of(struct: type[msgspec.Struct], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in struct.__struct_fields__ if name in values}


def flat(struct: msgspec.Struct) -> dict[str, Any]:
    """The fields of a struct and of those inside it by name, as builtin types: what `fill` takes."""
    values: dict[str, Any] = {}
    for name, value in msgspec.structs.asdict(struct).items():
        values |= flat(value) if isinstance(value, msgspec.Struct) else {name: msgspec.to_builtins(value)}
    return values


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


def component_flags(extras: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The flags that choose a component (`--vae-path PATH`) among arguments that the parser didn't know, and the rest.

    :raises UsageError: one is given twice, or without a path.
    """
    found: dict[str, str] = {}
    rest: list[str] = []
    tokens = iter(extras)
    for token in tokens:
        flag, equals, value = token.partition("=")
        if not flag.startswith("--") or _component(_plain(flag)) is None:
            rest.append(token)
            continue
        if flag in found:
            raise UsageError(f"{flag} is given twice")
        found[flag] = value if equals else next(tokens, "")
        if not found[flag] or (not equals and found[flag].startswith("--")):
            raise UsageError(f"{flag} needs a folder or a hub id")
    return found, rest


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


def _component(name: str) -> str | None:
    """The component that `vae_path` or `component_paths.vae` chooses; None for another name."""
    if name.startswith(_COMPONENTS):
        return name.removeprefix(_COMPONENTS)
    match = COMPONENT_PATH.fullmatch(name)
    known = {*options_by_name(), *LATER}
    # `modle_path` is a slip, `vae_path` is a component's path.
    if match is None or name in known or find_later(name) or _close(name, known, cutoff=0.85):
        return None
    return match["component"]


def _close(name: str, known: Collection[str], cutoff: float) -> str:
    """The known name that may have been meant."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), "")


def _each_component(given: Mapping[str, object], source: str) -> Iterator[tuple[str, object]]:
    """What is given, with an entry for each component's path."""
    option = options_by_name()["component_paths"]
    for spelled, raw in given.items():
        if _plain(spelled) != option.name or raw is None:
            yield spelled, raw
            continue
        paths = _value(option.name, raw, _shown(spelled, source))
        assert isinstance(paths, dict)
        yield from ((f"{spelled}.{name}", path) for name, path in paths.items())


def _name(spelled: str, shown: str) -> str:
    """The name of the option that is meant, of a component's path, or of what comes later.

    :raises UsageError: it is unknown.
    """
    name = _plain(spelled)
    if option := options_by_name().get(name):
        return option.name
    if (component := _component(name)) is not None:
        return _COMPONENTS + component
    _later(spelled, shown)
    return name


def _value(name: str, raw: object, shown: str) -> object:
    """The value of an option; of what comes later as it was given, since nothing says what it may be."""
    option = options_by_name().get(name)
    if name.startswith(_COMPONENTS):
        if not isinstance(raw, str) or not raw.strip():
            raise UsageError(f"{shown} is {raw!r}: Expected a folder or a hub id")
        return raw
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
    close = _close(name, options_by_name(), cutoff=0.8 if later else 0.6)
    if later and not (later.is_guess and close):
        return later
    meant = as_flag(close) if close and spelled.startswith("-") else close
    raise UsageError(f"{shown} is unknown" + (f"; did you mean {meant}?" if meant else ""))


def _check_supported(name: str, setting: Setting) -> None:
    """Refuse what needs a feature that isn't there yet, unless its value only states what is done anyway.

    :raises UsageError: names the setting as it was spelled, and the feature.
    """
    if name not in options_by_name():
        later = _later(setting.spelled, str(setting))
        if _said(setting.value) not in later.today:
            raise _not_yet(str(setting), later)


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
