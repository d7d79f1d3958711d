"""What was learned of a model's calls, kept between starts: one small file for each configuration of a model."""

import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from sgld.config import cache_root
from sgld.models.resolve import ModelSource


class KeptAxes(msgspec.Struct, frozen=True, array_like=True):
    """The axes of one kind of call: paths with (axis or None, size), of its arguments and of its results."""

    key: tuple[str, str, str]
    arguments: tuple[tuple[tuple[str | int, ...], int | None, int], ...]
    results: tuple[tuple[tuple[str | int, ...], int | None, int], ...]


class Kept(msgspec.Struct, frozen=True):
    """The content of a file."""

    axes: tuple[KeptAxes, ...] = ()
    modes: dict[str, str] = {}
    """Component name to merge or interleave, as last proved."""


def known_modes(source: ModelSource, index: dict[str, Any]) -> dict[str, str]:
    """The modes proved so far; empty where the model didn't run in company yet."""
    return read(source, index).modes


def read(source: ModelSource, index: dict[str, Any]) -> Kept:
    """What is kept of a model; nothing if there is no file, or one that another version wrote."""
    try:
        return msgspec.json.decode(_path(source, index).read_bytes(), type=Kept)
    except (OSError, msgspec.DecodeError):
        return Kept()


def write(source: ModelSource, index: dict[str, Any], kept: Kept) -> None:
    """Keep it; a folder that can't be written to is no error, the next start learns again."""
    path = _path(source, index)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(msgspec.json.encode(kept))
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)


def _path(source: ModelSource, index: dict[str, Any]) -> Path:
    """Named after the configurations of the components, since axes depend on these and on diffusers alone."""
    digest = hashlib.sha256(json.dumps([version("diffusers"), source.model_path, index], sort_keys=True).encode())
    for config in sorted(source.folder.rglob("config.json")) if source.folder else ():
        digest.update(config.read_bytes())
    return cache_root() / "learned" / f"{digest.hexdigest()[:24]}.json"
