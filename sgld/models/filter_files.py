"""From what a user calls the weights of a filter to what their file holds.

Pickles are read as weights only, so nothing in them runs.
"""

import functools
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from sgld.errors import InvalidRequest
from sgld.models import lookup
from sgld.outcome import Raised, Value, one_line, outcome_of

# safetensors first: it is read faster, and holds nothing but weights.
_SUFFIXES = (".safetensors", ".pth", ".pt", ".pkl")


class Unreadable(ValueError):
    """A file doesn't hold weights, and nothing else."""


def find(path: str, field: str, usual: Sequence[str] = ()) -> Path:
    """The file of weights, fetched from the hub if need be.

    :param field: the param that names it, for errors.
    :param usual: patterns of the names that are meant where there are several, the best first.
    :raises InvalidRequest: there is none, or it isn't clear which is meant.
    """
    try:
        return lookup.find(path, _SUFFIXES, usual)
    except lookup.NotFound as error:
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
