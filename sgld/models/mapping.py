"""Puts files of an overlay and its source into a new folder; no path and no link leads out of where it belongs."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import assert_never

from sgld.errors import ModelError
from sgld.models.manifest import AnyMapping, FileMapping, GlobMapping, TreeMapping

# Large files are linked where that is possible. Small ones are copied: who edits one doesn't change the source.
LINKED_FROM_BYTES = 64 * 2**20
# What an overlay doesn't consist of: its weights are those of the source.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".msgpack"}
NOT_OF_OVERLAYS = [f"*{ending}" for ending in sorted(_WEIGHTS)]
_IGNORED_FOLDERS = {".git", ".cache", "__pycache__"}


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files below a folder, in order; a link to a folder is followed, unless it leads back to one above."""
    real = folder.resolve()
    if real in above or folder.name in _IGNORED_FOLDERS:
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from files_below(path, (*above, real))
        else:
            yield path


def overlay_files(folder: Path) -> list[Path]:
    """The files that an overlay consists of."""
    return [path for path in files_below(folder) if path.suffix not in _WEIGHTS]


def apply(mapping: AnyMapping, source: Path, output: Path) -> None:
    """Put the files of one mapping into the output.

    :raises ModelError: there are none, or one of them isn't inside the source.
    """
    match mapping:
        case FileMapping(src=src, dst=dst):
            place(_file(source, src), source, output / (dst or Path(src).name))
        case TreeMapping(src=src, dst_dir=dst_dir):
            tree = inside(source, src)
            if not tree.is_dir():
                raise ModelError(f"the source {source} has no folder {src!r}, which a tree mapping names")
            for path in files_below(tree):
                place(path, source, output / (dst_dir or src) / path.relative_to(tree))
        case GlobMapping(src=src):
            matched = [path for path in sorted(source.glob(src)) if not path.is_dir()]
            if not matched:
                raise ModelError(f"nothing in the source {source} matches {src!r}, which a glob mapping names")
            for path in matched:
                place(path, source, output / path.relative_to(source))
        case unknown:
            assert_never(unknown)


def _file(source: Path, src: str) -> Path:
    path = inside(source, src)
    if not path.is_file():
        raise ModelError(f"the source {source} has no file {src!r}, which a file mapping names")
    return path


def place(path: Path, root: Path, target: Path) -> None:
    """Put a file of a root at a new place, in the stead of what may be there.

    :raises ModelError: it isn't inside the root.
    """
    real = inside(root, str(path.relative_to(root))).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Never written into: what is there may be a link to a file of the source.
    target.unlink(missing_ok=True)
    if real.stat().st_size >= LINKED_FROM_BYTES:
        try:
            os.link(real, target)
        except OSError:
            # Another file system, or one without links.
            shutil.copyfile(real, target)
    else:
        shutil.copyfile(real, target)


def inside(root: Path, relative: str) -> Path:
    """A path in a folder.

    Links may lead to the blobs of the same model, for the snapshots of the hub's cache consist of such links.

    :raises ModelError: it leads out of the folder.
    """
    path = root / relative
    allowed = [root.resolve()]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        allowed.append((root.parent.parent / "blobs").resolve())
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{path} can't be followed: {error}") from None
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise ModelError(f"{path} leads to {real}, out of {root}; files of overlays and sources stay in their folders")
    return path
