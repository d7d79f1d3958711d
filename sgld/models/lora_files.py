"""From what a user calls an adapter to its files. Only safetensors are read: a pickle may run code."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgld.errors import InvalidRequest
from sgld.models import lookup
from sgld.outcome import one_line

_SUFFIX = ".safetensors"
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
    try:
        weights = lookup.find(path, (_SUFFIX,), _USUAL, beside=_PEFT_CONFIG)
        if weights.suffix != _SUFFIX:
            raise lookup.NotFound(f"only {_SUFFIX} files are read, as others may run code")
        config = weights.parent / _PEFT_CONFIG
        return LoraFiles(weights, json.loads(config.read_text()) if config.is_file() else None)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"the LoRA adapter {path!r} can't be read: {one_line(error)}", "lora") from None


def identity_now(path: str) -> str | None:
    """The identity of files on this machine as they are now; None: they are elsewhere, or gone."""
    if lookup.place(path) is None:
        return None
    try:
        return find(path).identity
    except (InvalidRequest, OSError):
        return None
