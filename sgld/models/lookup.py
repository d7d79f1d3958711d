"""From what a user calls weights to their file: a file, a folder, or a repository on the Hugging Face hub.

`path:name` names one file of a folder or repository.
"""

from collections.abc import Collection, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from sgld.errors import ModelError
from sgld.models.hub import http_error, names_in
from sgld.models.resolve import hub_file, hub_file_if_any
from sgld.outcome import one_line


class NotFound(ValueError):
    """There is no such file, or it isn't clear which is meant."""


def find(path: str, suffixes: Sequence[str], usual: Sequence[str] = (), *, beside: str | None = None) -> Path:
    """The file that is meant, fetched from the hub if need be.

    :param suffixes: of files that hold weights, the best first.
    :param usual: patterns of the names that are meant where there are several, the best first.
    :param beside: a file that is fetched from the same folder, if it is there.
    :raises NotFound: there is none, or it isn't clear which is meant.
    """
    if "://" in path:
        raise NotFound("addresses aren't fetched; download the file, and name it by its path")
    there, name = _local(path), ""
    if there is None and ":" in path:
        path, _, name = path.rpartition(":")
        there = _local(path)
    try:
        if there is not None:
            return _in_folder(there, name, suffixes, usual) if there.is_dir() else there
        if is_hub_id(path):
            return _from_hub(path, name or _chosen(names_in(path, None), suffixes, usual), beside)
    except NotFound:
        raise
    except (ModelError, OSError, ValueError, http_error()) as error:
        raise NotFound(one_line(error)) from None
    raise NotFound("there is no such file or folder, and it isn't a Hugging Face id (owner/name, owner/name:file)")


def place(path: str) -> Path | None:
    """The file or folder of this machine that a path begins with; None: there is none."""
    return _local(path) or (_local(path.rpartition(":")[0]) if ":" in path else None)


def is_hub_id(path: str) -> bool:
    """Whether a path that isn't here may be one on the hub."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith(("/", ".safetensors"))


def _local(path: str) -> Path | None:
    try:
        found = Path(path).expanduser()
        return found if path and found.exists() else None
    except (OSError, RuntimeError, ValueError):
        # Too long a name, an unknown user after ~, a NUL.
        return None


def _in_folder(folder: Path, name: str, suffixes: Sequence[str], usual: Sequence[str]) -> Path:
    file = folder / (name or _chosen([file.name for file in folder.iterdir()], suffixes, usual))
    if not file.is_file() or not file.resolve().is_relative_to(folder.resolve()):
        raise NotFound(f"it has no file {file.name!r}")
    return file


def _from_hub(repo: str, name: str, beside: str | None) -> Path:
    file = hub_file(repo, name, None)
    if beside is not None:
        hub_file_if_any(repo, str(PurePosixPath(name).with_name(beside)), None)
    return file


def _chosen(names: Collection[str], suffixes: Sequence[str], usual: Sequence[str]) -> str:
    for suffix in suffixes:
        found = sorted(name for name in names if name.endswith(suffix))
        known = [name for pattern in usual for name in found if fnmatch(name, pattern)]
        if known or len(found) == 1:
            return (known or found)[0]
        if found:
            several = f"name one of them, as path:{found[0]} ({', '.join(found[:8])})"
            raise NotFound(f"it has several files of weights; {several}")
    raise NotFound(f"it has no file of weights ({', '.join(suffixes)})")
