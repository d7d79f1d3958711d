"""From what a user calls an adapter to its files: a file, a folder, or a repository on the Hugging Face hub.

`path:name` names one file of a folder or repository. Only safetensors are read: a pickle may run code.
"""

import hashlib
import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgld.errors import InvalidRequest
from sgld.models.resolve import one_line

SUFFIX = ".safetensors"
# What diffusers and peft write.
_USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class LoraFiles:
    """The weights of an adapter, and what peft says of them, if it wrote them."""

    weights: Path
    config: dict[str, Any] | None

    @property
    def identity(self) -> str:
        """Another one when the file has changed."""
        stat = self.weights.stat()
        said = f"{self.weights.resolve()} {stat.st_mtime_ns} {stat.st_size} {self.config}"
        return hashlib.sha1(said.encode(), usedforsecurity=False).hexdigest()[:16]


def find(path: str) -> LoraFiles:
    """The files of an adapter, fetched from the hub if need be.

    :raises InvalidRequest: there are none, or it isn't clear which are meant.
    """
    name, there = None, _local(path)
    if there is None and ":" in path:
        path, _, name = path.rpartition(":")
        there = _local(path)
    try:
        if there is not None:
            weights = _in_folder(there, name) if there.is_dir() else there
        elif is_hub_id(path):
            weights = _from_hub(path, name)
        else:
            raise _problem(path, "there is no such file or folder, and it isn't a Hugging Face id (owner/name)")
        if weights.suffix != SUFFIX:
            raise _problem(path, f"only {SUFFIX} files are read, as others may run code")
        config = weights.parent / _PEFT_CONFIG
        return LoraFiles(weights, json.loads(config.read_text()) if config.is_file() else None)
    except (OSError, ValueError) as error:
        raise _problem(path, one_line(error)) from None


def identity_now(path: str) -> str | None:
    """The identity of files on this machine as they are now; None: they are elsewhere, or gone."""
    if place(path) is None:
        return None
    try:
        return find(path).identity
    except (InvalidRequest, OSError):
        return None


def place(path: str) -> Path | None:
    """The file or folder of this machine that a path begins with; None: there is none."""
    return _local(path) or (_local(path.rpartition(":")[0]) if ":" in path else None)


def is_hub_id(path: str) -> bool:
    """Whether a path that isn't here may be one on the hub."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith(("/", SUFFIX))


def _local(path: str) -> Path | None:
    try:
        found = Path(path).expanduser()
        return found if path and found.exists() else None
    except (OSError, RuntimeError, ValueError):
        # Too long a name, an unknown user after ~, a NUL.
        return None


def _in_folder(folder: Path, name: str | None) -> Path:
    weights = folder / (name or _chosen(str(folder), [file.name for file in folder.iterdir()]))
    if not weights.is_file() or not weights.resolve().is_relative_to(folder.resolve()):
        raise _problem(str(folder), f"it has no file {weights.name!r}")
    return weights


def _from_hub(repo: str, name: str | None) -> Path:
    from huggingface_hub import hf_hub_download, list_repo_files
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        name = name or _chosen(repo, list_repo_files(repo))
        weights = Path(hf_hub_download(repo, name))
    except (EntryNotFoundError, HfHubHTTPError) as error:
        raise _problem(repo, one_line(error)) from None
    # Beside the weights, where it is looked for.
    with suppress(EntryNotFoundError):
        hf_hub_download(repo, str(Path(name).parent / _PEFT_CONFIG))
    return weights


def _chosen(where: str, names: Collection[str]) -> str:
    found = sorted(name for name in names if name.endswith(SUFFIX))
    usual = [name for name in _USUAL if name in found]
    if usual or len(found) == 1:
        return (usual or found)[0]
    if not found:
        raise _problem(where, f"it has no {SUFFIX} file")
    raise _problem(where, f"it has several files, name one of them as {where}:{found[0]} ({', '.join(found[:8])})")


def _problem(path: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"the LoRA adapter {path!r} can't be read: {what}", "lora")
