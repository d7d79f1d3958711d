"""Weights apart from their component: which files they are, and what these say of themselves without being read."""

import glob
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sgld.errors import ModelError
from sgld.models.hub import fetch, names_in
from sgld.models.weights import header_of
from sgld.outcome import one_line

_SUFFIXES = (".safetensors", ".gguf")
_INDEX_SUFFIX = ".safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.*)-\d{5}-of-\d{5}\.safetensors")
_ON_HUB = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)(?P<folder>/[\w./-]*)?(?::(?P<part>[\w./-]+))?")
_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/]+/[^/]+)(?:/(?P<rest>.*))?")


class TensorInfo(NamedTuple):
    """What a header says of a tensor; `dtype` as safetensors spells it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What the headers of safetensors files say, all together."""

    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where weights are: below `folder`, or in `repo` on the hub; `path` is a file or folder there, or part of one."""

    name: str
    folder: Path | None
    path: str = ""
    repo: str = ""
    revision: str | None = None


@dataclass(frozen=True)
class Weights:
    """Files of weights, on this machine. `config` is the config.json beside them, if there is one."""

    name: str
    files: tuple[Path, ...]
    config: Mapping[str, Any] | None = None

    @property
    def is_gguf(self) -> bool:
        return self.files[0].suffix == ".gguf"

    def header(self) -> Header:
        """:raises ModelError: a file can't be read."""
        headers = [read_header(path) for path in self.files if path.suffix == ".safetensors"]
        return Header(
            {name: info for header in headers for name, info in header.tensors.items()},
            {name: value for header in headers for name, value in header.metadata.items()},
        )


def is_file_of_weights(path: str) -> bool:
    """Whether it can only be weights, by its name."""
    return path.endswith((*_SUFFIXES, _INDEX_SUFFIX))


def place_of(name: str) -> Place:
    """Where weights are by what a user calls them; nothing is fetched.

    A file, a folder, an index of shards, `owner/repo`, `owner/repo/subfolder`, `owner/repo:file`, or the address of
    one of these on huggingface.co. After the colon may be a part of a file's name, as Q4_K_M.

    :raises ModelError: it is none of these.
    """
    if match := _PAGE.fullmatch(name.split("?")[0].rstrip("/")):
        # tree/<revision>/<folder>, blob/<revision>/<file> or resolve/<revision>/<file>
        _, at, path = ((match["rest"] or "") + "//").split("/", 2)
        return Place(name, None, path.strip("/"), match["repo"], at or None)
    try:
        local = Path(name).expanduser()
        is_folder, is_file = bool(name) and local.is_dir(), local.is_file()
    except (OSError, RuntimeError, ValueError):
        is_folder = is_file = False
    if is_folder or is_file:
        return Place(name, local if is_folder else local.parent, "" if is_folder else local.name)
    match = _ON_HUB.fullmatch(name)
    if match is None:
        raise ModelError(
            f"there is no file or folder {name!r}, and it isn't on Hugging Face (owner/repo or owner/repo:file)"
        )
    path = "/".join(filter(None, ((match["folder"] or "").strip("/"), match["part"])))
    return Place(name, None, path, match["repo"], None)


def weights_at(place: Place) -> Weights:
    """The files of a place, fetched from the hub if need be.

    :raises ModelError: there are none, several that could be meant, or the hub can't be reached.
    """
    if place.folder is not None:
        names = [str(path.relative_to(place.folder)) for path in place.folder.glob("*") if path.is_file()]
        chosen = chosen_files(names, place.path, place.name)
        files = tuple(place.folder / name for name in chosen)
    else:
        files = _fetched(place)
    beside = files[0].parent / "config.json"
    return Weights(place.name, files, read_json(beside) if beside.is_file() and not _names_a_file(place) else None)


def _names_a_file(place: Place) -> bool:
    """Whether it is one file that is meant: what lies beside it is something else."""
    return place.path.endswith(_SUFFIXES)


def _fetched(place: Place) -> tuple[Path, ...]:
    names = names_in(place.repo, place.revision)
    chosen = chosen_files(names, place.path, place.name)
    beside = str(PurePosixPath(chosen[0]).with_name("config.json"))
    folder = fetch(place.repo, place.revision, allow=[*map(glob.escape, chosen), beside])
    return tuple(folder / name for name in chosen)


def chosen_files(names: Collection[str], path: str, asked: str) -> tuple[str, ...]:
    """The files that are meant by a path: a file, a folder, an index, or a part of a file's name.

    Of several in a folder: one that is called mixed, the shards of the only index, the only file.

    :param asked: what the user wrote.
    :raises ModelError: there are none, or several that could be meant.
    """
    if path.endswith(_INDEX_SUFFIX) and path in names:
        return _shards(names, path.removesuffix(_INDEX_SUFFIX), asked)
    if path in names:
        if not path.endswith(_SUFFIXES):
            raise ModelError(f"{asked} isn't a file of weights: its name ends neither in .safetensors nor in .gguf")
        return (path,)
    prefix = f"{path}/" if path else ""
    inside = [n for n in names if n.startswith(prefix) and "/" not in n[len(prefix) :]]
    if not any(n.endswith(_SUFFIXES) for n in inside):
        inside = [n for n in names if path.lower() in n.lower()] if path else inside
    files = sorted(n for n in inside if n.endswith(_SUFFIXES))
    mixed = [n for n in files if n.endswith("-mixed.safetensors")]
    stems = {match["stem"] for n in files if (match := _SHARD.fullmatch(n))}
    if len(mixed) == 1:
        return tuple(mixed)
    if len(stems) == 1 and all(_SHARD.fullmatch(n) for n in files):
        return tuple(files)
    if len(files) == 1:
        return tuple(files)
    if not files:
        raise ModelError(f"{asked} has no weights: no file there ends in .safetensors or .gguf")
    shown = ", ".join(PurePosixPath(n).name for n in files[:8]) + (", ..." if len(files) > 8 else "")
    raise ModelError(f"{asked} has several files of weights; name one of them: {shown}")


def _shards(names: Collection[str], stem: str, asked: str) -> tuple[str, ...]:
    shards = tuple(sorted(n for n in names if (match := _SHARD.fullmatch(n)) and match["stem"] == stem))
    if not shards:
        raise ModelError(f"{asked} is an index without its shards: there is no {stem}-00001-of-....safetensors")
    return shards


def read_header(path: Path) -> Header:
    """What a safetensors file says of its tensors.

    :raises ModelError: it isn't one.
    """
    entries = header_of(path)
    metadata = entries.pop("__metadata__", None) or {}
    try:
        return Header({name: TensorInfo(e["dtype"], tuple(e["shape"])) for name, e in entries.items()}, metadata)
    except (TypeError, KeyError) as error:
        raise ModelError(f"{path} can't be read: {one_line(error)}") from None


def read_json(path: Path) -> dict[str, Any]:
    """:raises ModelError: it isn't a JSON object."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} can't be read: {one_line(error)}") from None
