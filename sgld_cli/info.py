"""`sgld info`: what a model consists of, without loading it."""

from collections.abc import Sequence

import msgspec

from sgld.models.describe import Description, describe
from sgld_cli.progress import print_result


def run(model_path: str, *, as_json: bool) -> int:
    """Print what the model consists of.

    :raises ModelError: the model can't be found or read.
    """
    description = describe(model_path)
    print_result(as_json_text(model_path, description) if as_json else as_text(model_path, description))
    return 0


def as_json_text(model_path: str, description: Description) -> str:
    """The description as one JSON object."""
    names = ("name", "library", "class_name", "size_bytes", "dtype")
    content = {
        "model_path": model_path,
        "pipeline_class": description.pipeline_class,
        "components": [{name: getattr(component, name) for name in names} for component in description.components],
        "defaults": dict(description.defaults),
        "modes": dict(description.modes),
    }
    return msgspec.json.encode(content).decode()


def as_text(model_path: str, description: Description) -> str:
    """The description for people: a table of components, then the defaults."""
    rows = [("component", "class", "size", "dtype", "requests share forwards")]
    for part in description.components:
        mode = description.modes.get(part.name, "")
        size = size_text(part.size_bytes) if part.size_bytes else ""
        rows.append((part.name, f"{part.library}.{part.class_name}", size, part.dtype or "", mode))
    total = size_text(sum(part.size_bytes for part in description.components))
    defaults = [f"  {name}: {value}" for name, value in description.defaults.items()]
    lines = [f"{model_path}: {description.pipeline_class}, {total}", "", *_table(rows)]
    if not description.modes:
        lines += ["", "Which components merge requests isn't proved yet: it is learned from the first requests."]
    return "\n".join([*lines, "", "defaults:", *defaults] if defaults else lines)


def size_text(size_bytes: int) -> str:
    """`512 B`, `1.5 MB`, `24.0 GB` (powers of ten)."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
