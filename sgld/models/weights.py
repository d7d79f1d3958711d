"""What safetensors files say of the tensors inside them, without reading these."""

import json
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sgld.errors import ModelError
from sgld.outcome import one_line

# The first 8 bytes of a safetensors file are the length of its JSON header. Source: github.com/huggingface/safetensors.
_HEADER_LENGTH = struct.Struct("<Q")


def tensors_in(path: Path) -> dict[str, dict[str, Any]]:
    """The `dtype`, `shape` and `data_offsets` of each tensor, by name.

    :raises ModelError: it isn't a safetensors file.
    """
    return {name: entry for name, entry in header_of(path).items() if name != "__metadata__"}


def header_of(path: Path) -> dict[str, Any]:
    """All that a file says of itself: what of its tensors, and text under `__metadata__`.

    :raises ModelError: it isn't a safetensors file.
    """
    try:
        with path.open("rb") as file:
            (length,) = _HEADER_LENGTH.unpack(file.read(_HEADER_LENGTH.size))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            return dict(json.loads(file.read(length)))
    except (OSError, ValueError, TypeError, struct.error) as error:
        raise ModelError(f"{path} can't be read: {one_line(error)}") from None


def main_dtype(paths: Iterable[Path]) -> str | None:
    """The dtype of most elements in some files, as they spell it; None if there are none.

    :raises ModelError: one isn't a safetensors file.
    """
    counts: Counter[str] = Counter()
    for path in paths:
        for entry in tensors_in(path).values():
            counts[entry["dtype"]] += entry["data_offsets"][1] - entry["data_offsets"][0]
    return counts.most_common(1)[0][0] if counts else None
