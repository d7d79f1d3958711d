"""What a model consists of, read from its files without loading it."""

import json
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgld.config import EngineConfig
from sgld.errors import ModelError
from sgld.models.plan import ComponentPlan, plan
from sgld.models.resolve import defaults, one_line
from sgld.models.verdicts import VerdictFile

# The first 8 bytes of a safetensors file are the length of its JSON header. Source: github.com/huggingface/safetensors.
_HEADER_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Component:
    """One entry of model_index.json; `size_bytes` is that of its files, `dtype` that of most of its weights."""

    name: str
    library: str
    class_name: str
    size_bytes: int
    dtype: str | None


@dataclass(frozen=True)
class Description:
    """A model: its pipeline, its components, what was decided of them, and what was proved of them so far."""

    pipeline_class: str
    components: tuple[Component, ...]
    defaults: dict[str, Any]
    modes: dict[str, str]
    """Component name to merge, interleave or exclusive."""
    decisions: dict[str, str]
    """Component name, or `model`, to how it is loaded."""


def describe(config: EngineConfig) -> Description:
    """Describe a model as it would be loaded; of one on the hub only what is in its model_index.json.

    :raises ModelError: it can't be found or read.
    """
    planned = plan(config, materializes=False)
    source = planned.source
    return Description(
        pipeline_class=planned.pipeline_class,
        components=tuple(map(_component, planned.components)),
        defaults=defaults(source),
        modes=VerdictFile(source, planned.index, planned.components).read().modes,
        decisions=planned.decisions(),
    )


def _component(part: ComponentPlan) -> Component:
    folder = part.source.folder
    files = [path for path in folder.rglob("*") if path.is_file()] if folder else []
    weights = [path for path in files if path.suffix == ".safetensors"]
    size_bytes = sum(path.stat().st_size for path in files)
    return Component(part.name, part.library, part.class_name, size_bytes, _main_dtype(weights))


def _main_dtype(weights: list[Path]) -> str | None:
    """The dtype of most elements in some safetensors files, as they spell it; None if there are none."""
    counts: Counter[str] = Counter()
    for path in weights:
        for name, entry in _header(path).items():
            if name != "__metadata__":
                counts[entry["dtype"]] += entry["data_offsets"][1] - entry["data_offsets"][0]
    return counts.most_common(1)[0][0] if counts else None


def _header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors.

    :raises ModelError: it isn't one.
    """
    try:
        with path.open("rb") as file:
            (length,) = _HEADER_LENGTH.unpack(file.read(_HEADER_LENGTH.size))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            return dict(json.loads(file.read(length)))
    except (OSError, ValueError, TypeError, struct.error) as error:
        raise ModelError(f"{path} can't be read: {one_line(error)}") from None
