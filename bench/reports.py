"""What each report of a bench says of where it was made, and how it is written."""

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def where(device: str) -> dict[str, Any]:
    """The machine and the versions, for a report; `device` is cpu or cuda."""
    name = _gpu() if device == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    return {
        "machine": f"{name}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def _gpu() -> str:
    import torch  # takes seconds: not for benches that measure others

    return torch.cuda.get_device_name()


def command() -> str:
    """How this report was asked for, without the place that it is written to."""
    words = [f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    return " ".join(["python", *words])


def versions(report: Mapping[str, Any]) -> str:
    """Those of libraries, as `where` has them, in one line."""
    return ", ".join(f"{name} {number}" for name, number in report["versions"].items())


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [_cells(head), "|---" * len(head) + "|", *map(_cells, rows)]


def _cells(values: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, values))} |"


def write(out: Path, report: dict[str, Any], text: str) -> None:
    """FILE.json with all numbers, and FILE.md for people."""
    out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    out.with_suffix(".md").write_text(text)


def write_rows(out: Path, report: dict[str, Any], title: str) -> None:
    """The same of a report whose rows have names, and are said as they are."""
    rows = "\n".join(f"- {name}: {json.dumps(said)}" for name, said in report["rows"].items())
    write(out, report, f"# {title}\n\n{report['machine']}\n\n{rows}\n")
