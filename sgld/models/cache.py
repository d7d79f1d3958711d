"""What is kept under the cache root, listed and removed: materialised models, and what was learned of models."""

import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from filelock import Timeout

from sgld.config import cache_root
from sgld.errors import InvalidRequest, ModelError
from sgld.models.materialize import (
    MARKER_FILE,
    TEMPORARY,
    Record,
    hash_of_contents,
    hash_of_times,
    local_folder,
    locked,
    materialized_root,
    read_record,
)

State = Literal["current", "outdated", "unknown", "interrupted"]
"""What it was made of is still the same, or isn't; is gone, so that nobody can tell; or it was never made whole."""
_USELESS: tuple[State, ...] = ("outdated", "interrupted")


class CacheItem(msgspec.Struct, frozen=True, kw_only=True):
    """A materialised model, or a file of what was learned. `used_at` is in seconds since 1970."""

    kind: Literal["model", "learned"]
    name: str
    path: str
    size_bytes: int
    used_at: float
    state: State
    source: str = ""
    overlay: str = ""


class _LearnedOf(msgspec.Struct, frozen=True):
    """Of a file of learned times only which model it is about; others don't say."""

    model: str = ""


@dataclass(frozen=True)
class Pruned:
    """What was removed, and what wasn't because another process makes it."""

    removed: tuple[CacheItem, ...]
    in_use: tuple[CacheItem, ...]


def cache_items() -> list[CacheItem]:
    """All that sgld keeps, the models first, each by name; what others put there isn't listed.

    :raises ModelError: the cache can't be read.
    """
    try:
        folders = (path for path in sorted(materialized_root().glob("*")) if path.is_dir())
        models = [item for path in folders if (item := _model(path)) is not None]
        return models + [_learned(path) for path in sorted((cache_root() / "learned").glob("*.json"))]
    except OSError as error:
        raise ModelError(f"the cache in {cache_root()} can't be read: {error}") from None


def _model(folder: Path) -> CacheItem | None:
    record = read_record(folder)
    if record is None and not folder.name.endswith(TEMPORARY):
        return None
    marker = folder / MARKER_FILE
    return CacheItem(
        kind="model",
        name=folder.name.removesuffix(TEMPORARY),
        path=str(folder),
        size_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        used_at=(marker if marker.exists() else folder).stat().st_mtime,
        state="interrupted" if record is None or folder.name.endswith(TEMPORARY) else _state(record),
        source=record.inputs.source if record else "",
        overlay=record.inputs.overlay if record else "",
    )


def _state(record: Record) -> State:
    """Whether what a model was made of is as it was, as far as this machine knows."""
    inputs, overlay, source = record.inputs, Path(record.overlay_folder), local_folder(record.inputs.source)
    if not overlay.is_dir() or (inputs.source_files is not None and source is None):
        return "unknown"
    try:
        is_same = hash_of_contents(overlay) == inputs.overlay_files
        is_same &= inputs.source_files is None or source is None or hash_of_times(source) == inputs.source_files
    except (OSError, ModelError):
        return "unknown"
    return "current" if is_same else "outdated"


def _learned(path: Path) -> CacheItem:
    try:
        model = msgspec.json.decode(path.read_bytes(), type=_LearnedOf).model
    except msgspec.DecodeError:
        model = ""
    stat = path.stat()
    return CacheItem(
        kind="learned",
        name=path.stem,
        path=str(path),
        size_bytes=stat.st_size,
        used_at=stat.st_mtime,
        state="current",
        source=model,
    )


def chosen(
    items: Iterable[CacheItem], *, names: Sequence[str] = (), older_than_s: float | None = None, takes_all: bool = False
) -> list[CacheItem]:
    """What is to be removed: all that is named and that old; where nothing is said, what no start would use again.

    :raises InvalidRequest: there is nothing of a name.
    """
    items = list(items)
    for name in names:
        if name not in {item.name for item in items}:
            raise InvalidRequest(f"the cache has no {name!r}; sgld cache list shows what it has")
    if not names and older_than_s is None and not takes_all:
        return [item for item in items if item.state in _USELESS]
    oldest = time.time() - (older_than_s or 0)
    return [item for item in items if (not names or item.name in names) and item.used_at <= oldest]


def prune(items: Iterable[CacheItem]) -> Pruned:
    """Remove them, but for what another process makes at this moment.

    A model that is running needs its folder only until it is loaded.

    :raises ModelError: one of them can't be removed.
    """
    removed: list[CacheItem] = []
    in_use: list[CacheItem] = []
    for item in items:
        try:
            _remove(item)
            removed.append(item)
        except Timeout:
            in_use.append(item)
        except OSError as error:
            raise ModelError(f"{item.path} can't be removed: {error}") from None
    return Pruned(tuple(removed), tuple(in_use))


def _remove(item: CacheItem) -> None:
    path = Path(item.path)
    if item.kind == "learned":
        path.unlink(missing_ok=True)
        return
    with locked(item.name, timeout_s=0), suppress(FileNotFoundError):
        # Renamed first: of what is interrupted here nobody takes the rest for a model.
        leftover = path if path.name.endswith(TEMPORARY) else path.replace(path.with_name(path.name + TEMPORARY))
        shutil.rmtree(leftover)
