"""From what a user calls the weights of a filter to their file: a file, a folder, or a repository on the hub.

`path:name` names one file of a folder or repository. Pickles are read as weights only, so nothing in them runs.
"""

import functools
import pickle
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

import torch
from safetensors.torch import load_file

from sgld.errors import InvalidRequest, ModelError
from sgld.models.hub import http_error, names_in
from sgld.models.lora_files import is_hub_id, place
from sgld.models.resolve import hub_file, one_line
from sgld.outcome import Raised, Value, outcome_of

# safetensors first: it is read faster, and holds nothing but weights.
SUFFIXES = (".safetensors", ".pth", ".pt", ".pkl")


class Unreadable(ValueError):
    """There are no weights where they should be."""


def find(path: str, field: str, usual: Sequence[str] = ()) -> Path:
    """The file of weights, fetched from the hub if need be.

    :param field: the param that names it, for errors.
    :param usual: names of the files that are meant where there are several, the first first.
    :raises InvalidRequest: there is none, or it isn't clear which is meant.
    """
    try:
        return _found(path, usual)
    except (Unreadable, ModelError, OSError, ValueError, http_error()) as error:
        raise InvalidRequest(f"{field} is {path[:200]!r}: {one_line(error)}", field) from None


def read(file: Path) -> object:
    """What a file of weights holds, on the CPU.

    :raises Unreadable: it can't be read, or holds more than weights.
    """
    # What is in a damaged file decides what is raised.
    match outcome_of(functools.partial(_loaded, file)):
        case Value(value=weights):
            return weights
        case Raised(error=pickle.UnpicklingError()):
            problem = "is no file of weights, or holds more than weights, which might run code"
            raise Unreadable(f"{file.name} {problem}")
        case Raised(error=error):
            raise Unreadable(f"{file.name} can't be read: {one_line(error)}")


def _loaded(file: Path) -> object:
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def cached(repo: str, name: str) -> Path | None:
    """A file of the hub that was fetched before; None if it wasn't. Asks nobody."""
    from huggingface_hub import try_to_load_from_cache  # takes a second

    found = try_to_load_from_cache(repo, name)
    return Path(found) if isinstance(found, str) else None


def _found(path: str, usual: Sequence[str]) -> Path:
    if "://" in path:
        raise Unreadable("addresses aren't fetched; download the file, and name it by its path")
    there = place(path)
    repo, _, name = path.rpartition(":") if ":" in path else (path, "", "")
    if there is not None and there.is_file():
        return there
    if there is not None:
        name = name if str(there) != str(Path(path).expanduser()) else ""
        return _in_folder(there, name, usual)
    if not is_hub_id(repo):
        raise Unreadable(
            "there is no such file or folder, and it isn't a Hugging Face id (owner/name, owner/name:file)"
        )
    return hub_file(repo, name or _chosen(names_in(repo, None), usual), None)


def _in_folder(folder: Path, name: str, usual: Sequence[str]) -> Path:
    file = folder / (name or _chosen([file.name for file in folder.iterdir()], usual))
    if not file.is_file() or not file.resolve().is_relative_to(folder.resolve()):
        raise Unreadable(f"it has no file {file.name!r}")
    return file


def _chosen(names: Collection[str], usual: Sequence[str]) -> str:
    for suffix in SUFFIXES:
        found = sorted(name for name in names if name.endswith(suffix))
        known = [name for want in usual for name in found if PurePosixPath(name).stem == want]
        if known or len(found) == 1:
            return (known or found)[0]
        if found:
            raise Unreadable(
                f"it has several files of weights; name one of them, as :{found[0]} ({', '.join(found[:8])})"
            )
    raise Unreadable(f"it has no file of weights ({', '.join(SUFFIXES)})")
