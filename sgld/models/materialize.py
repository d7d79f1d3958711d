"""Makes a model of an overlay and its source, once: a folder in the layout of diffusers under the cache root.

The folder is named after all that it is made of. It gets its name when it is whole, so what an interruption leaves is
never taken for a model.
"""

import hashlib
import json
import os
import shutil
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout

from sgld.config import cache_root
from sgld.errors import ModelError
from sgld.models.hub import fetch
from sgld.models.manifest import Manifest
from sgld.models.mapping import apply, files_below, inside, overlay_files, place
from sgld.models.resolve import EMBEDDED, INDEX_FILE
from sgld.outcome import one_line

MARKER_FILE = ".sgld_materialized.json"
TEMPORARY = ".sgld-tmp"
_FORMAT = 1


@dataclass(frozen=True)
class Overlay:
    """A source model, and the small repo that makes a model in the layout of diffusers of it.

    `source` and `name` are folders or ids on the hub; `source_folder` is None if the source is there. `folder` has the
    files of the overlay, and `written` is its manifest as it is written.
    """

    source: str
    source_folder: Path | None
    source_revision: str | None
    name: str
    revision: str | None
    folder: Path
    manifest: Manifest
    written: dict[str, Any]


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """All that a materialised model depends on; a branch of the hub by its name only."""

    source: str
    source_revision: str | None
    source_files: str | None
    """Hash of names, sizes and times, if the source is a folder."""
    overlay: str
    overlay_revision: str | None
    overlay_files: str
    """Hash of names and contents."""
    materializer_version: str
    format: int = _FORMAT

    @property
    def name(self) -> str:
        """The name of the model's folder."""
        digest = hashlib.sha256(json.dumps(msgspec.to_builtins(self), sort_keys=True).encode()).hexdigest()
        readable = "__".join(Path(self.source).parts[-2:]).lstrip("/_")
        return f"{readable[:150]}-{digest[:16]}"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What a materialised model was made of, and its files with their sizes: the content of its marker."""

    inputs: Inputs
    overlay_folder: str
    files: dict[str, int]


def materialized_root() -> Path:
    """Where materialised models are."""
    return cache_root() / "materialized_models"


def inputs_of(overlay: Overlay) -> Inputs:
    """What the model is made of.

    :raises ModelError: files can't be read, or a link leads out of its folder.
    """
    folder = overlay.source_folder
    try:
        return Inputs(
            source=str(folder.absolute()) if folder and overlay.source not in EMBEDDED else overlay.source,
            source_revision=overlay.source_revision,
            source_files=hash_of_times(folder) if folder else None,
            overlay=overlay.name,
            overlay_revision=overlay.revision,
            overlay_files=hash_of_contents(overlay.folder),
            materializer_version=overlay.manifest.materializer_version,
        )
    except OSError as error:
        raise ModelError(f"overlay {overlay.name} and its source can't be read: {one_line(error)}") from None


def local_folder(source: str) -> Path | None:
    """The folder of a source; None: it is on the hub."""
    try:
        folder = EMBEDDED.get(source) or Path(source).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):
        return None  # too long a name, an unknown user after ~, a NUL


def hash_of_times(folder: Path) -> str:
    """A hash of the files in a folder, by name, size and time: their contents may take minutes to read."""
    files = {str(path.relative_to(folder)): path.stat() for path in files_below(folder)}
    listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files.items()]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def hash_of_contents(folder: Path) -> str:
    """A hash of the files of an overlay, by name and content."""
    digest = hashlib.sha256()
    for path in overlay_files(folder):
        name = str(path.relative_to(folder))
        digest.update(json.dumps([name, hashlib.sha256(inside(folder, name).read_bytes()).hexdigest()]).encode())
    return digest.hexdigest()


def whole(inputs: Inputs) -> Path | None:
    """The folder of the model that is made of these inputs, if it is there and whole; it counts as used now."""
    folder = materialized_root() / inputs.name
    record = read_record(folder)
    if record is None:
        return None
    try:
        if any((folder / name).stat().st_size != size for name, size in record.files.items()):
            return None
    except OSError:
        return None
    # Of a cache that others own, the last use isn't known.
    with suppress(OSError):
        os.utime(folder / MARKER_FILE)
    return folder


def read_record(folder: Path) -> Record | None:
    """What a materialised model was made of; None if the folder isn't one that is whole."""
    try:
        return msgspec.json.decode((folder / MARKER_FILE).read_bytes(), type=Record)
    except (OSError, msgspec.DecodeError):
        return None


def materialize(overlay: Overlay, inputs: Inputs, *, trust_remote_code: bool) -> Path:
    """The folder of the model, which is made unless it is there.

    Processes that share the cache root make it one after the other; the second finds it.

    :raises ModelError: it can't be made, or runs code that isn't trusted.
    """
    if (folder := whole(inputs)) is not None:
        return folder
    if overlay.manifest.custom_materializer and not trust_remote_code:
        raise ModelError(
            f"overlay {overlay.name} runs code of its own ({overlay.manifest.custom_materializer}) to make the model; "
            "read it, and allow it with --trust-remote-code"
        )
    target = materialized_root() / inputs.name
    try:
        remove_leftovers()
        with locked(target.name):
            return whole(inputs) or _made(overlay, inputs, target)
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(f"{overlay.source} can't be materialised with overlay {overlay.name}: {error}") from None


@contextmanager
def locked(name: str, timeout_s: float = -1) -> Iterator[None]:
    """Alone with the folder of this name.

    The lock is in the cache, so that hosts that share a cache share it. Whoever has it works, and when they die the
    kernel takes it back: there is no deadline.

    :raises Timeout: others have it; never if `timeout_s` is negative.
    """
    path = materialized_root() / ".locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path, timeout=timeout_s):
        yield


def remove_leftovers() -> None:
    """Remove what interruptions left, unless somebody works on it."""
    for leftover in materialized_root().glob(f"*{TEMPORARY}"):
        with suppress(Timeout), locked(leftover.name.removesuffix(TEMPORARY), timeout_s=0):
            shutil.rmtree(leftover, ignore_errors=True)


def _made(overlay: Overlay, inputs: Inputs, target: Path) -> Path:
    temporary = target.with_name(target.name + TEMPORARY)
    for leftover in (temporary, target):
        if leftover.exists():
            shutil.rmtree(leftover)
    source = _source_folder(overlay)
    temporary.mkdir(parents=True)
    try:
        _build(overlay, source, temporary)
        files = {str(path.relative_to(temporary)): path.stat().st_size for path in files_below(temporary)}
        record = Record(inputs=inputs, overlay_folder=str(overlay.folder.absolute()), files=files)
        (temporary / MARKER_FILE).write_bytes(msgspec.json.encode(record))
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _build(overlay: Overlay, source: Path, output: Path) -> None:
    """Fill the folder of a model: files of the overlay, then those of the source, then what its own code makes."""
    for path in overlay_files(overlay.folder):
        name = path.relative_to(overlay.folder)
        if name.parts[0] != "_overlay":
            place(path, overlay.folder, output / name)
    for mapping in overlay.manifest.file_mappings:
        apply(mapping, source, output)
    if overlay.manifest.custom_materializer:
        _run_materializer(overlay, source, output)
    index = msgspec.json.decode((output / INDEX_FILE).read_bytes(), type=dict[str, Any])
    # (library, class); the class of a pipeline of its own is written like this, too.
    components = [n for n, v in index.items() if isinstance(v, list) and len(v) == 2 and isinstance(v[0], str)]
    missing = [name for name in components if name[0] != "_" and not (output / name).is_dir()]
    if missing:
        raise ModelError(
            f"overlay {overlay.name} makes no {', '.join(missing)} of {overlay.source}, which its {INDEX_FILE} names; "
            "a mapping is missing"
        )


def _run_materializer(overlay: Overlay, source: Path, output: Path) -> None:
    script = inside(overlay.folder, str(overlay.manifest.custom_materializer))
    if not script.is_file():
        raise ModelError(f"overlay {overlay.name} has no {overlay.manifest.custom_materializer}, its materializer")
    module = types.ModuleType("_overlay_materializer")
    module.__file__ = str(script)
    try:
        # Not imported: that would write bytecode beside it, and so change the overlay.
        exec(compile(script.read_bytes(), str(script), "exec"), vars(module))
        run = getattr(module, "materialize", None)
        if run is None:
            raise ModelError(f"{script} must define materialize(overlay_dir, source_dir, output_dir, manifest)")
        run(
            overlay_dir=str(overlay.folder),
            source_dir=str(source),
            output_dir=str(output),
            manifest=overlay.written,
        )
    except ModelError:
        raise
    except (Exception, SystemExit) as error:  # a script may end as it likes
        raise ModelError(f"{script} failed: {type(error).__name__}: {one_line(error)}") from error


def _source_folder(overlay: Overlay) -> Path:
    """The files of the source, fetched from the hub if need be.

    :raises ModelError: it can't be fetched, or lacks files that the overlay requires.
    """
    required = overlay.manifest.required_source_files
    folder = overlay.source_folder
    if folder is not None:
        if missing := _missing(folder, required):
            raise ModelError(f"the source {folder} lacks {', '.join(missing)}, which overlay {overlay.name} requires")
        return folder
    patterns = overlay.manifest.source_allow_patterns
    allowed = None if patterns is None else [*patterns, *required]
    folder = fetch(overlay.source, overlay.source_revision, allow=allowed, ignore=["*.onnx", "*.msgpack"])
    if missing := _missing(folder, required):
        # The cache may have lost them; what is whole stays.
        folder = fetch(overlay.source, overlay.source_revision, allow=missing, force=True)
    if missing := _missing(folder, required):
        raise ModelError(
            f"{overlay.source} on the hub lacks {', '.join(missing)}, which overlay {overlay.name} requires; they were "
            "asked for twice"
        )
    return folder


def _missing(folder: Path, required: tuple[str, ...]) -> list[str]:
    return [name for name in required if not inside(folder, name).is_file()]
