"""From what a user calls a model to where it is: a folder on disk, or an id on the Hugging Face hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgld.config import EMBEDDED_IMAGE_MODEL, EMBEDDED_VIDEO_MODEL
from sgld.errors import ModelError

EMBEDDED = {
    EMBEDDED_IMAGE_MODEL: Path(__file__).parent / "embedded" / "tiny_image",
    EMBEDDED_VIDEO_MODEL: Path(__file__).parent / "embedded" / "tiny_video",
}
INDEX_FILE = "model_index.json"
MODULAR_INDEX_FILE = "modular_model_index.json"
DEFAULTS_FILE = "sgld_defaults.json"


@dataclass(frozen=True)
class ModelSource:
    """Where a model is: `folder` holds its index; None means that `model_path` is an id on the hub.

    `notes` say how it came to be there, one phrase each.
    """

    model_path: str
    folder: Path | None
    revision: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def pretrained_name(self) -> str:
        """What diffusers loads."""
        return str(self.folder or self.model_path)


def resolve(model_path: str) -> ModelSource:
    """Find a model without loading it or reaching the hub.

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
        if _index_in(folder) is None:
            raise ModelError(f"{model_path} has no {INDEX_FILE}; a model is a folder in the layout of diffusers")
        return ModelSource(model_path, folder)
    if is_there:
        raise ModelError(f"{model_path} is a file; a model is a folder in the layout of diffusers")
    if not is_hub_id(model_path):
        raise ModelError(missing)
    return ModelSource(model_path, None)


def is_hub_id(path: str) -> bool:
    """Whether it can be an id on the Hugging Face hub."""
    return path.count("/") <= 1 and not path.startswith((".", "/", "~")) and bool(path.strip())


def model_index(source: ModelSource) -> dict[str, Any]:
    """The model's model_index.json, or that of a modular pipeline, fetched from the hub if need be.

    :raises ModelError: it can't be read.
    """
    try:
        index = _index_in(source.folder) if source.folder else _index_on_hub(source.model_path, source.revision)
        return dict(json.loads((index or Path(INDEX_FILE)).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{INDEX_FILE} of {source.model_path} can't be read: {one_line(error)}") from None


def _index_in(folder: Path) -> Path | None:
    return next((folder / name for name in (INDEX_FILE, MODULAR_INDEX_FILE) if (folder / name).is_file()), None)


def _index_on_hub(model_id: str, revision: str | None) -> Path:
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return hub_file(model_id, INDEX_FILE, revision)
    except EntryNotFoundError:
        return hub_file(model_id, MODULAR_INDEX_FILE, revision)


def hub_file(model_id: str, name: str, revision: str | None) -> Path:
    """Where a file of a repository lies on this machine, fetched if need be.

    :raises EntryNotFoundError: there is no such file, or the hub can't be reached and it wasn't fetched before.
    :raises OSError: the repository or the hub can't be had.
    """
    from huggingface_hub import hf_hub_download  # takes a second

    return Path(hf_hub_download(model_id, name, revision=revision))


def defaults(source: ModelSource) -> dict[str, Any]:
    """What the model's author recommends: sampling params by name; empty where nothing is said.

    :raises ModelError: what is said can't be read.
    """
    path = source.folder / DEFAULTS_FILE if source.folder else None
    try:
        return dict(json.loads(path.read_text())) if path and path.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{DEFAULTS_FILE} of {source.model_path} can't be read: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
