"""What was learned of a model's calls, kept between starts: one small file for each configuration of a model."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import msgspec

from sgld.config import cache_root
from sgld.models.resolve import ModelSource

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


class VerdictFile:
    """The file of one configuration of a model.

    It is named after the configurations of the components and what was decided of them.

    :param components: those of its plan.
    """

    def __init__(self, source: ModelSource, index: dict[str, Any], components: "Sequence[ComponentPlan]" = ()) -> None:
        # What is loaded as the index says has nothing to add.
        decided = [(part.name, str(part.source), part.class_name, part.notes) for part in components if part.notes]
        named = [version("diffusers"), source.model_path, index, sorted(decided)]
        digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode())
        folders = [source.folder, *(part.source.folder for part in components if part.is_separate)]
        for config in (path for folder in folders if folder for path in sorted(folder.rglob("config.json"))):
            digest.update(config.read_bytes())
        self.name = digest.hexdigest()[:24]
        self._path = cache_root() / "learned" / f"{self.name}.json"

    def read(self) -> Kept:
        """What is kept; nothing if there is no file, or one that another version wrote."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Kept)
        except (OSError, msgspec.DecodeError):
            return Kept()

    def write(self, kept: Kept) -> None:
        """Keep it, atomically. A folder that can't be written to is no error: the next start learns again."""
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(msgspec.json.encode(kept))
            temporary.replace(self._path)
        except OSError as error:
            logger.warning("what was learned of the model can't be kept: %s", error)
