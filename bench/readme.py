"""Makes bench/README.md and its plots of bench/results/*.json: what each bench answers, and the answers.

python bench/readme.py
"""

import ast
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too

import compared
import roofline
import serving
from agreement import Asked
from charts import Line, line_chart
from rows import ROWS

HERE = Path(__file__).parent
RESULTS = HERE / "results"
_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


def made(results: Path = RESULTS) -> dict[str, str]:
    """The content of each file that is made, by its path from here."""
    files: dict[str, str] = {}
    lines = ["# Benches", "", "One file for each question. Reports are in [results](results), and name their machine."]
    lines += ["This page is made of them by `python bench/readme.py`.", "", *_questions(results), ""]
    for path in sorted(results.glob("*.json")):
        report = json.loads(path.read_text())
        if path.stem.startswith("compare"):
            lines += [*_demoted(compared.text(report)), *_plot(files, path.stem, steps_chart(report))]
        elif path.stem.startswith("roofline"):
            lines += _demoted(roofline.table(report))
        elif path.stem.startswith("serving"):
            lines += [*_demoted(serving.text(report)), *_plot(files, path.stem, latency_chart(report))]
    return {"README.md": "\n".join(lines).rstrip() + "\n", **files}


def _questions(results: Path) -> list[str]:
    """Each bench that can be run: its question, its first command, its reports."""
    lines = ["| question | command | reports |", "|---|---|---|"]
    for path in sorted(HERE.glob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        command = re.search(r"^\s*(python bench/.*)$", doc, re.MULTILINE)
        # What is no bench is a part of one.
        if command and "?" in doc.partition("\n")[0]:
            found = sorted(results.glob(f"{path.stem}*.md"))
            links = ", ".join(f"[{report.stem}](results/{report.name})" for report in found)
            lines.append(f"| {doc.partition(chr(10))[0]} | `{command[1].replace('|', chr(92) + '|')}` | {links} |")
    return lines


def _demoted(text: str) -> list[str]:
    """A report as a section of a page."""
    return [f"#{line}" if line.startswith("#") else line for line in text.splitlines()] + [""]


def _plot(files: dict[str, str], name: str, chart: str | None) -> list[str]:
    if chart is None:
        return []
    files[f"results/{name}.svg"] = chart
    return [f"![{name}](results/{name}.svg)", ""]


def steps_chart(report: Mapping[str, Any]) -> str | None:
    """Milliseconds of a step of FLUX over the side of the picture; None where no two sizes were measured."""
    lines: dict[str, Line] = {}
    for side in ("eager", "compiled", "sgld"):
        points = [
            (float(ROWS[m["row"]].size["height"]), sorted(m["step_ms"])[len(m["step_ms"]) // 2])
            for m in report["measured"]
            if m["side"] == side and m["row"].startswith("flux") and m["step_ms"]
        ]
        if len(points) > 1:
            lines[side] = sorted(points)
    title = f"FLUX.1-dev size, {report['machine'].partition(',')[0]}"
    return line_chart(title, "side of the picture", "ms of a step", lines) if lines else None


def latency_chart(report: Mapping[str, Any]) -> str | None:
    """How many times longer than alone requests took, by kind: quantiles."""
    lines: dict[str, Line] = {}
    for name, alone_s in report["alone_s"].items():
        asked = [Asked(**one) for one in report["asked"]]
        taken = sorted(one.latency_s / alone_s for one in asked if one.kind == name and one.is_done)
        if taken:
            lines[name] = [(share, taken[int(share * (len(taken) - 1))]) for share in _SHARES]
    title = f"Mix {report['mix']} at load {report['load']:g}"
    return line_chart(title, "share of requests", "times what it takes alone", lines) if lines else None


def main() -> None:
    for name, content in made().items():
        (HERE / name).write_text(content)


if __name__ == "__main__":
    main()
