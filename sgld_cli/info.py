"""`sgld info`: what a model consists of, without loading it."""

import argparse
from collections.abc import Sequence

import msgspec

from sgld.config import EngineConfig
from sgld.models.describe import Description, describe
from sgld_cli.progress import print_result
from sgld_cli.settings import fill, given, merge


def run(args: argparse.Namespace) -> int:
    """Print what the model consists of.

    :raises UsageError: a setting can't be used.
    :raises ModelError: the model can't be found or read.
    """
    config = fill(EngineConfig, {name: setting.value for name, setting in merge(given(args)).items()})
    description = describe(config)
    print_result(as_json_text(config.model_path, description) if args.json else as_text(config.model_path, description))
    return 0


def as_json_text(model_path: str, description: Description) -> str:
    """The description as one JSON object."""
    names = ("name", "library", "class_name", "size_bytes", "dtype")
    content = {
        "model_path": model_path,
        "pipeline_class": description.pipeline_class,
        "components": [{name: getattr(component, name) for name in names} for component in description.components],
        "defaults": {name: default.value for name, default in description.defaults.items()},
        "default_origins": {name: default.origin for name, default in description.defaults.items()},
        "modes": dict(description.modes),
        "decisions": dict(description.decisions),
    }
    return msgspec.json.encode(content).decode()


def as_text(model_path: str, description: Description) -> str:
    """The description for people: a table of components, how they are loaded, then the defaults."""
    rows = [("component", "class", "size", "dtype", "requests share forwards")]
    for part in description.components:
        mode = description.modes.get(part.name, "")
        size = size_text(part.size_bytes) if part.size_bytes else ""
        rows.append((part.name, f"{part.library}.{part.class_name}", size, part.dtype or "", mode))
    total = size_text(sum(part.size_bytes for part in description.components))
    defaults = [f"  {name}: {default.value} ({default.origin})" for name, default in description.defaults.items()]
    lines = [f"{model_path}: {description.pipeline_class}, {total}", "", *table(rows)]
    if not description.modes:
        lines += ["", "Which components merge requests isn't proved yet: it is learned from the first requests."]
    decisions = [f"  {name}: {said}" for name, said in description.decisions.items()]
    lines += ["", "loaded as:", *decisions] if decisions else []
    return "\n".join([*lines, "", "what requests get that say nothing:", *defaults] if defaults else lines)


def size_text(size_bytes: int) -> str:
    """`512 B`, `1.5 MB`, `24.0 GB` (powers of ten)."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
