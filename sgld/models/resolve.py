"""From what a user calls a model to where it is: a folder on disk, or an id on the Hugging Face hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgld.config import EMBEDDED_IMAGE_MODEL, EMBEDDED_VIDEO_MODEL
from sgld.errors import ModelError
from sgld.outcome import one_line

EMBEDDED = {
    EMBEDDED_IMAGE_MODEL: Path(__file__).parent / "embedded" / "tiny_image",
    EMBEDDED_VIDEO_MODEL: Path(__file__).parent / "embedded" / "tiny_video",
}
INDEX_FILE = "model_index.json"
MODULAR_INDEX_FILE = "modular_model_index.json"
DEFAULTS_FILE = "sgld_defaults.json"


@dataclass(frozen=True)
class ModelSource:
    """Where a model is: `folder` holds its index; None means that it is on the hub.

    `hub_id` is its id there, `model_path` if None, and `subfolder` its place in that repository. `file` has all
    weights of a model that is one file; the rest is then where its configuration is.
    `notes` say how it came to be there, one phrase each.
    """

    model_path: str
    folder: Path | None
    revision: str | None = None
    notes: tuple[str, ...] = ()
    hub_id: str | None = None
    subfolder: str | None = None
    file: Path | None = None

    @property
    def pretrained_name(self) -> str:
        """What diffusers loads."""
        return str(self.folder or self.hub_id or self.model_path)

    def inside(self, name: str) -> str:
        """The place of a file or folder of a model on the hub."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


def resolve(model_path: str, subfolder: str | None = None) -> ModelSource:
    """Find a model without loading it or reaching the hub.

    :param subfolder: where it is in the folder or repository.
    :raises ModelError: it is a folder without an index, or neither a folder nor a possible hub id.
    """
    missing = f"there is no folder {model_path!r}, and it isn't a Hugging Face model id (owner/name)"
    try:
        folder = EMBEDDED.get(model_path) or Path(model_path).expanduser()
        is_folder, is_there = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError):
        # Too long a name, an unknown user after ~, a NUL.
        raise ModelError(missing) from None
    if is_folder:
        folder = folder / (subfolder or "")
        if _index_in(folder) is None:
            where = f"{model_path}/{subfolder}" if subfolder else model_path
            raise ModelError(f"{where} has no {INDEX_FILE}; a model is a folder in the layout of diffusers")
        return ModelSource(model_path, folder)
    if is_there:
        raise ModelError(
            f"{model_path} is a file; a model is a folder in the layout of diffusers, or a .safetensors file"
        )
    if not is_hub_id(model_path):
        raise ModelError(missing)
    return ModelSource(model_path, None, subfolder=subfolder)


def is_hub_id(path: str) -> bool:
    """Whether it can be an id on the Hugging Face hub."""
    return path.count("/") <= 1 and not path.startswith((".", "/", "~")) and bool(path.strip())


def model_index(source: ModelSource) -> dict[str, Any]:
    """The model's model_index.json, or that of a modular pipeline, fetched from the hub if need be.

    :raises ModelError: it can't be read.
    """
    try:
        index = _index_in(source.folder) if source.folder is not None else _index_on_hub(source)
        if index is None:
            raise OSError("there is none")
        return dict(json.loads(index.read_text()))
    except (OSError, ValueError, TypeError) as error:
        hint = f" of {source.pretrained_name} (else say with --single-file-config)" if source.file else ""
        raise ModelError(f"{INDEX_FILE}{hint or f' of {source.model_path}'} can't be read: {one_line(error)}") from None


def is_modular(index: dict[str, Any]) -> bool:
    """Whether the index of a model is that of a modular pipeline."""
    return "_blocks_class_name" in index


def _index_in(folder: Path) -> Path | None:
    return next((folder / name for name in (INDEX_FILE, MODULAR_INDEX_FILE) if (folder / name).is_file()), None)


def _index_on_hub(source: ModelSource) -> Path | None:
    names = (source.inside(name) for name in (INDEX_FILE, MODULAR_INDEX_FILE))
    found = (hub_file_if_any(source.pretrained_name, name, source.revision) for name in names)
    return next(filter(None, found), None)


def hub_file(model_id: str, name: str, revision: str | None) -> Path:
    """Where a file of a repository lies on this machine, fetched if need be.

    :raises EntryNotFoundError: there is no such file, or the hub can't be reached and it wasn't fetched before.
    :raises OSError: the repository or the hub can't be had.
    """
    from huggingface_hub import hf_hub_download  # takes a second

    return Path(hf_hub_download(model_id, name, revision=revision))


def hub_file_if_any(model_id: str, name: str, revision: str | None) -> Path | None:
    """The same, but None if the repository has no such file; offline, if it wasn't fetched before.

    :raises OSError: the repository or the hub can't be had.
    """
    from huggingface_hub import constants  # takes a second
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return hub_file(model_id, name, revision)
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE:
            raise  # the hub can't be reached
        return None


def defaults(source: ModelSource) -> dict[str, Any]:
    """What the model's author recommends: sampling params by name; empty where nothing is said.

    :raises ModelError: what is said can't be read.
    """
    path = source.folder / DEFAULTS_FILE if source.folder else None
    try:
        return dict(json.loads(path.read_text())) if path and path.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{DEFAULTS_FILE} of {source.model_path} can't be read: {one_line(error)}") from None
