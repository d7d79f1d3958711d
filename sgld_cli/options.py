"""The flags of `sgld generate`, built from the structs that hold their values.

A field of such a struct is a flag (`--num-frames`) and a key of the config file (`num_frames`); its `Meta` gives the
help text and other spellings (`aliases`). Nothing here imports more than msgspec: `--help` must answer at once.
"""

import argparse
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, NoReturn, get_type_hints

import msgspec
from msgspec import Meta, inspect

from sgld.config import EngineConfig, OutputConfig, ServerConfig
from sgld.sampling_params import SamplingParams
from sgld.storage_config import StorageConfig
from sgld_cli.later import LATER

Kind = Literal["value", "switch", "list", "json"]


class UsageError(ValueError):
    """What was asked for on the command line, or in a file that it names, can't be done."""


class Prompts(msgspec.Struct, frozen=True, kw_only=True):
    """Where the prompts come from: here there may be several, in `SamplingParams` there is one."""

    prompt: Annotated[tuple[str, ...], Meta(description="what to generate; several prompts run at the same time")] = ()
    prompt_path: Annotated[str | None, Meta(description="text file with one prompt per line")] = None


# A name belongs to the first struct that has it: `prompt` to Prompts.
SAMPLING_GROUP, STORAGE_GROUP, OUTPUT_GROUP, HTTP_GROUP = "sampling", "storage", "output", "HTTP server"
GROUPS: tuple[tuple[str, tuple[type[msgspec.Struct], ...]], ...] = (
    ("model and runtime", (EngineConfig,)),
    (SAMPLING_GROUP, (Prompts, SamplingParams)),
    # Before both structs that it is a part of.
    (STORAGE_GROUP, (StorageConfig,)),
    (OUTPUT_GROUP, (OutputConfig,)),
    (HTTP_GROUP, (ServerConfig,)),
)


@dataclass(frozen=True)
class Option:
    """One setting: a flag and a key of the config file.

    :ivar type: the annotation of its field, which says what values it takes.
    :ivar is_scheduling: it decides when an output is made, not what it is.
    :ivar parse: what an item that is written as text stands for; a list stands for several.
    """

    name: str
    group: str
    type: Any
    kind: Kind
    default: object
    description: str
    metavar: str
    aliases: tuple[str, ...] = ()
    is_scheduling: bool = False
    parse: Callable[[str], object] | None = None

    @property
    def flags(self) -> list[str]:
        return [as_flag(name) for name in (self.name, *self.aliases)]

    @property
    def help(self) -> str:
        """The help text; argparse takes `%` for the start of a format."""
        text = self.description.replace("%", "%%")
        return text if self.default in (None, (), {}, "") else f"{text} (default: {_shown(self.default)})"

    def convert(self, raw: object) -> object:
        """The value that `raw`, a string of the command line or a value of a config file, stands for.

        :raises UsageError: it isn't one; the message says what is expected, but not which option it is.
        """
        if self.kind == "list" and isinstance(raw, str):
            raw = [raw]
        try:
            if self.kind == "json" and isinstance(raw, str):
                raw = msgspec.json.decode(raw)
            if self.parse is not None and isinstance(raw, list):
                raw = self._parsed(raw)
            value = msgspec.convert(raw, self.type, strict=False)
            if self.kind == "json":
                # YAML can also hold objects that contain themselves, or keys that no JSON object has.
                msgspec.json.encode(value)
            return value
        except (RecursionError, TypeError) as error:
            raise UsageError(f"It is nested too deeply or isn't JSON: {error}") from None
        except msgspec.MsgspecError as error:
            choices = self.metavar.startswith("{")
            problem = f"Expected one of {self.metavar}" if choices else str(error).replace("`", "")
            raise UsageError(problem) from None

    def _parsed(self, items: list[object]) -> list[object]:
        assert self.parse is not None
        parsed = [self.parse(item) if isinstance(item, str) else item for item in items]
        return [part for item in parsed for part in (item if isinstance(item, list) else [item])]


def as_flag(name: str) -> str:
    """The flag of a config key."""
    return "--" + name.replace("_", "-")


@cache
def options() -> tuple[Option, ...]:
    """Every option, in the order of the help text."""
    found: dict[str, Option] = {}
    for group, structs in GROUPS:
        for struct in structs:
            for option in _options_of(struct, group):
                found.setdefault(option.name, option)
    return tuple(found.values())


@cache
def options_by_name() -> dict[str, Option]:
    """Every option under its name and its aliases."""
    return {name: option for option in options() for name in (option.name, *option.aliases)}


def _options_of(struct: type[msgspec.Struct], group: str) -> list[Option]:
    """The options of its fields; a struct inside it is a group of options, not one."""
    hints = get_type_hints(struct, include_extras=True)
    made: list[Option] = []
    for field in inspect.type_info(struct).fields:  # type: ignore[attr-defined]
        if isinstance(field.type, inspect.StructType):
            made += _options_of(field.type.cls, group)
        elif (option := _option(field, hints[field.name], group)) is not None:
            made.append(option)
    return made


def _option(field: inspect.Field, hint: Any, group: str) -> Option | None:
    """The option of a field; None if it is for programs only (`is_flag` in its `Meta`)."""
    core, description, extra = _unwrap(field.type)
    if not extra.get("is_flag", True):
        return None
    default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    return Option(
        name=field.name,
        group=group,
        type=hint,
        kind=_kind(core),
        default=default,
        description=description,
        metavar=_metavar(core, field.name),
        aliases=extra.get("aliases", ()),
        is_scheduling=extra.get("is_scheduling", False),
        parse=extra.get("parse"),
    )


def _unwrap(node: inspect.Type) -> tuple[inspect.Type, str, dict[str, Any]]:
    """The type below optional and annotation, its description, and what else its `Meta` says."""
    if isinstance(node, inspect.UnionType):
        return _unwrap(next(part for part in node.types if not isinstance(part, inspect.NoneType)))
    if isinstance(node, inspect.Metadata):
        core, description, extra = _unwrap(node.type)
        return core, (node.extra_json_schema or {}).get("description", description), {**extra, **(node.extra or {})}
    return node, "", {}


def _kind(core: inspect.Type) -> Kind:
    match core:
        case inspect.BoolType():
            return "switch"
        case inspect.VarTupleType():
            return "list"
        case inspect.DictType() | inspect.StructType():
            return "json"
        case _:
            return "value"


def _metavar(core: inspect.Type, name: str) -> str:
    match core:
        case inspect.LiteralType(values=values):
            return "{" + ",".join(map(str, values)) + "}"
        case inspect.BoolType():
            return "true|false"
        case inspect.DictType() | inspect.StructType():
            return "JSON"
        case inspect.IntType():
            return "N"
        case inspect.FloatType():
            return "X"
        case _:
            return name.rpartition("_")[2].upper()


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of leaving, and takes no abbreviated flags."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """:raises UsageError: always; the caller decides how to say it."""
        raise UsageError(message)


class _Collect(argparse.Action):
    """Notes what was given, under the spelling that was used, in `namespace.given`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given: dict[str, Any] = vars(namespace).setdefault("given", {})
        flag = option_string or self.option_strings[0]
        if self.nargs == 0:  # --no-flag
            given[as_flag(self.dest)] = self.const
        elif isinstance(values, list) and self.nargs == "+":  # --prompt A --prompt B
            given[flag] = [*given.get(flag, []), *values]
        else:
            given[flag] = values


_NARGS: dict[Kind, str | None] = {"value": None, "json": None, "list": "+", "switch": "?"}


def add_flags(parser: argparse.ArgumentParser, *, ignored: Collection[str] = ()) -> None:
    """Add a flag for every option, by groups, and hidden ones for what comes later.

    :param ignored: groups whose options do nothing in this command.
    """
    for title, _ in GROUPS:
        group = parser.add_argument_group(f"{title} (accepted and ignored here)" if title in ignored else title)
        for option in options():
            if option.group == title:
                _add_flag(group, option)
    for name in LATER:
        parser.add_argument(
            as_flag(name), action=_Collect, nargs="*", help=argparse.SUPPRESS, default=argparse.SUPPRESS
        )


def _add_flag(group: argparse._ArgumentGroup, option: Option) -> None:
    group.add_argument(
        *option.flags,
        action=_Collect,
        dest=option.name,
        nargs=_NARGS[option.kind],
        const="true" if option.kind == "switch" else None,
        metavar=option.metavar,
        default=argparse.SUPPRESS,
        help=option.help,
    )
    if option.kind == "switch":
        group.add_argument(
            "--no-" + option.flags[0][2:],
            action=_Collect,
            dest=option.name,
            nargs=0,
            const="false",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


_UNDERSCORED = re.compile(r"--[A-Za-z][\w-]*(?=$|=)")


def with_dashes(argv: Sequence[str]) -> list[str]:
    """`--num_frames` is `--num-frames`; values stay as they are."""
    return [
        _UNDERSCORED.sub(lambda flag: flag[0].replace("_", "-"), token) if token[:2] == "--" else token
        for token in argv
    ]
