"""What was learned of a model's calls, kept between starts: one small file for each configuration of a model."""

import hashlib
import json
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sgld.config import cache_root
from sgld.models.resolve import ModelSource
from sgld.models.shared_file import change

if TYPE_CHECKING:
    from sgld.models.plan import ComponentPlan

logger = logging.getLogger(__name__)


class KeptLeaf(msgspec.Struct, frozen=True, array_like=True):
    """A batched argument or result: where it is, its batch axis (None: a list of rows), its size at one sample."""

    path: tuple[str | int, ...]
    axis: int | None
    size: int


class KeptMask(msgspec.Struct, frozen=True, array_like=True):
    """An argument that says where another one is padded: where both are, and its dtype."""

    path: tuple[str | int, ...]
    like: tuple[str | int, ...]
    dtype: str


class KeptAxes(msgspec.Struct, frozen=True, array_like=True):
    """The axes of one kind of call: component, method and form, what is batched, and what can be padded."""

    key: tuple[str, str, str]
    arguments: tuple[KeptLeaf, ...]
    results: tuple[KeptLeaf, ...]
    lengths: tuple[tuple[tuple[str | int, ...], int], ...]
    masks: tuple[KeptMask, ...]


class Kept(msgspec.Struct, frozen=True):
    """The content of a file."""

    axes: tuple[KeptAxes, ...] = ()
    modes: dict[str, str] = {}
    """Component name to merge, interleave or exclusive, as last proved."""


NOTHING = Kept()


class VerdictFile:
    """The file of one configuration of a model.

    It is named after the configurations of the components and what was decided of them.

    :param components: those of its plan.
    """

    def __init__(self, source: ModelSource, index: dict[str, Any], components: "Sequence[ComponentPlan]" = ()) -> None:
        folders = [source.folder, *(part.source.folder for part in components if part.is_separate)]
        # What is loaded as the index says has nothing to add.
        noted = [part for part in components if part.notes]
        decided = [
            (part.name, _place(part.source.folder, str(part.source)), part.class_name, part.notes) for part in noted
        ]
        named = [version("diffusers"), _place(source.folder, source.model_path), index, sorted(decided)]
        digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode())
        for config in (path for folder in folders if folder for path in sorted(folder.rglob("config.json"))):
            digest.update(config.read_bytes())
        self.name = digest.hexdigest()[:24]
        self._path = cache_root() / "learned" / f"{self.name}.json"

    def read(self) -> Kept:
        """What is kept; nothing if there is no file, or one that another version wrote."""
        try:
            return _decoded(self._path.read_bytes())
        except OSError:
            return Kept()

    def write(self, kept: Kept, before: Kept = NOTHING) -> None:
        """Keep what is known now, beside what other processes wrote meanwhile.

        A folder that can't be written to is no error: the next start learns again.

        :param before: what was known when it was read or written last; other modes than there are news.
        """
        try:
            change(self._path, lambda content: msgspec.json.encode(_merged(_decoded(content), kept, before)))
        except OSError as error:
            logger.warning("what was learned of the model can't be kept: %s", error)


def _place(folder: Path | None, name: str) -> str:
    """Where something is, however the way to its folder was written."""
    return str(folder.resolve()) if folder is not None else name


def _decoded(content: bytes) -> Kept:
    try:
        return msgspec.json.decode(content, type=Kept)
    except msgspec.DecodeError:
        return NOTHING


def _merged(there: Kept, kept: Kept, before: Kept) -> Kept:
    if there == NOTHING:
        return kept
    axes = {one.key: one for one in (*there.axes, *kept.axes)}
    news = {name: mode for name, mode in kept.modes.items() if before.modes.get(name) != mode}
    return Kept(tuple(axes.values()), there.modes | news)
