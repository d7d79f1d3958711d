"""What bench/compare.py measured, as text."""

import math
import statistics
from typing import Any

import reports
from rows import NUM_STAGGERED, ROWS, Row

_UNSETTLED = " †"
# Pairs whose pictures are compared: what is measured, and what it is measured against.
PAIRS = (("compiled", "eager"), ("sgld-exact", "eager"), ("sgld", "eager"), ("sgld", "sgld-exact"))


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = ["# How much faster is sgld than plain diffusers?", "", f"`{report['command']}`", ""]
    lines += [f"{report['machine']}; {reports.versions(report)}. Options of sgld: {report['options'] or 'none'}."]
    lines += ["Medians of whole requests after the first, in seconds; ratios are how many times faster sgld is.", ""]
    lines += [*_table(report), ""]
    if any(map(_mark, report["measured"])):
        because = "measured while code was still on its way, or before times were steady; no figure to quote"
        lines += [f"{_UNSETTLED.strip()}: {because}.", ""]
    if usual := _usual_table(report):
        lines += ["## With as many steps as usual, computed", "", *usual, ""]
    if any("step_tflop" in m["notes"] for m in report["measured"]):
        lines += ["## How much of the device's arithmetic a step reaches", "", *_roofline(report), ""]
    if any(m["side"].startswith("http") for m in report["measured"]):
        lines += ["## Over HTTP", "", *_http_table(report), ""]
    if report["starts"]:
        lines += ["## From the start of `sgld serve`", "", *_starts(report), ""]
    if report["pictures"]:
        lines += ["## How far pictures are from one another", "", *_pictures(report), ""]
    if report["models"]:
        lines += ["## The models", "", *_models(report), ""]
    if report["skipped"]:
        lines += [f"Left out, as there was no time for it: {', '.join(dict.fromkeys(report['skipped']))}.", ""]
    if report["problems"]:
        lines += ["## What went wrong", "", *(f"- {_short(problem)}" for problem in report["problems"]), ""]
    return "\n".join(lines)


def _short(problem: str) -> str:
    """Who had it, and the last line of what it said."""
    return f"{problem.partition(':')[0]}: {(problem.strip().splitlines() or [''])[-1][:300]}"


def _found(report: dict[str, Any], row: str) -> dict[str, dict[str, Any]]:
    return {m["side"]: m for m in report["measured"] if m["row"] == row}


def _mark(measured: dict[str, Any] | None) -> str:
    """Stands beside what was measured while sgld hadn't settled."""
    return _UNSETTLED if measured and measured["notes"].get("unsettled") else ""


def _table(report: dict[str, Any]) -> list[str]:
    head = ["work", "launch, µs", "eager", "compiled", "sgld", "sgld, first", "before it compiled"]
    head += ["against eager", "wanted"]
    head += ["of a step", "wanted", "against compiled", "wanted"]
    lines: list[list[str]] = []
    for row in ROWS.values():
        sides = _found(report, row.name)
        if row.kind == "http" or not sides:
            continue
        eager, compiled, early = (sides.get(side) for side in ("eager", "compiled", "sgld-early"))
        ours = sides.get("sgld") or early
        mark = _mark(ours)
        cells = [_work(row), _number(eager, "launch_us", 1), _seconds(eager), _seconds(compiled), _seconds(ours) + mark]
        cells += [_number(ours, "first_s", 2), _seconds(early)]
        cells += [_ratio(eager, ours, "warm_s", mark), _wanted(row.least)]
        cells += [_ratio(eager, ours, "step_ms", mark), _wanted(row.least_denoise)]
        cells += [_ratio(compiled, ours, "warm_s", mark), _wanted(row.least_compiled)]
        lines.append(cells)
    return reports.table(head, lines)


def _work(row: Row) -> str:
    size = "x".join(str(row.size[name]) for name in ("num_frames", "height", "width") if name in row.size)
    if row.kind == "staggered":
        return f"{row.model} {size}, {NUM_STAGGERED} staggered requests, 20 to 30 steps; seconds of one"
    return f"{row.model} {size}, {row.num_steps} steps"


def _seconds(measured: dict[str, Any] | None) -> str:
    return f"{statistics.median(measured['warm_s']):.3f}" if measured else ""


def _number(measured: dict[str, Any] | None, name: str, digits: int) -> str:
    return f"{measured[name]:.{digits}f}" if measured and measured[name] is not None else ""


def ratio(base: dict[str, Any] | None, ours: dict[str, Any] | None, name: str) -> float:
    """How many times faster, by medians; NaN where one of them isn't known."""
    if base is None or ours is None or not base[name] or not ours[name]:
        return math.nan
    return float(statistics.median(base[name]) / statistics.median(ours[name]))


def _ratio(base: dict[str, Any] | None, ours: dict[str, Any] | None, name: str, mark: str = "") -> str:
    value = ratio(base, ours, name)
    return "" if math.isnan(value) else f"{value:.2f}x{mark}"


def _wanted(least: float | None) -> str:
    return f"{least:g}x" if least else ""


def usual_s(measured: dict[str, Any] | None, row: Row) -> float:
    """Seconds of a request with as many steps as usual: what isn't a step stays. NaN where that isn't known."""
    if measured is None or row.usual_steps is None or not measured["step_ms"]:
        return math.nan
    more = row.usual_steps - row.num_steps
    runs = zip(measured["warm_s"], measured["step_ms"], strict=True)
    return float(statistics.median(warm_s + more * step_ms / 1e3 for warm_s, step_ms in runs))


def _usual_table(report: dict[str, Any]) -> list[str]:
    lines = []
    for row in ROWS.values():
        sides = _found(report, row.name)
        ours = sides.get("sgld") or sides.get("sgld-early")
        eager_s, compiled_s, ours_s = (usual_s(each, row) for each in (sides.get("eager"), sides.get("compiled"), ours))
        if math.isnan(ours_s):
            continue
        cells = [
            _work(row),
            str(row.usual_steps),
            *("" if math.isnan(s) else f"{s:.2f}" for s in (eager_s, compiled_s)),
        ]
        cells += [f"{ours_s:.2f}{_mark(ours)}"]
        cells += ["" if math.isnan(eager_s) else f"{eager_s / ours_s:.2f}x{_mark(ours)}", _wanted(row.least)]
        lines.append(cells)
    head = ["measured", "steps", "eager, s", "compiled, s", "sgld, s", "against eager", "wanted"]
    said = "Not measured: the time of a request as it was, and of a measured step for each further one."
    return [said, "", *reports.table(head, lines)] if lines else []


def _http_table(report: dict[str, Any]) -> list[str]:
    lines: list[tuple[str, ...]] = []
    for row in ROWS.values():
        sides = _found(report, row.name)
        ours = sides.get("http") or sides.get("http-early")
        if ours:
            early = _seconds(sides.get("http-early"))
            lines.append((_work(row), _seconds(ours) + _mark(ours), early, f"{row.within_s}"))
    return reports.table(["work", "s", "before it compiled", "on an H200, wanted"], lines)


def _roofline(report: dict[str, Any]) -> list[str]:
    roofs = [m["notes"]["roof_tflops"] for m in report["measured"] if "roof_tflops" in m["notes"]]
    said = f"Of an 8192³ product in bf16, {statistics.median(roofs):.0f} TFLOP/s: whole steps, denoiser and all else."
    head = ["work", "TFLOP of a step", "eager", "compiled", "sgld", "wanted", "of it outside of forwards", "these ran"]
    lines: list[list[str]] = []
    for row in ROWS.values():
        found = _found(report, row.name)
        sides = {"sgld": found["sgld-early"]} | found if "sgld-early" in found else found
        tflop = sides.get("eager", {}).get("notes", {}).get("step_tflop")
        if tflop:
            cells = [_share(sides.get(side), tflop, statistics.median(roofs)) for side in ("eager", "compiled", "sgld")]
            cells[-1] += _mark(sides.get("sgld"))
            cells.append(f"{row.least_roof:.0%}" if row.least_roof else "")
            cells += next((_ran(ticks) for ticks in report["ticks"] if ticks["row"] == row.name), ["", ""])
            lines.append([_work(row), f"{tflop:.1f}", *cells])
    return [said, "", *reports.table(head, lines)]


def _ran(ticks: dict[str, Any]) -> list[str]:
    return [f"{ticks['lost']:.1%}", ", ".join(f"{name or 'forward'} {n}" for name, n in ticks["variants"].items())]


def _share(measured: dict[str, Any] | None, tflop: float, roof: float) -> str:
    if not measured or not measured["step_ms"]:
        return ""
    step_ms = statistics.median(measured["step_ms"])
    return f"{step_ms:.1f} ms, {1e3 * tflop / step_ms / roof:.0%}"


def _starts(report: dict[str, Any]) -> list[str]:
    lines = []
    for start in report["starts"]:
        answers = ", ".join(f"{row} {s:.1f}" for row, s in zip(start["rows"], start["first_answers_s"], strict=True))
        lines.append((start["model"], start["cache"], f"{start['ready_s']:.1f}", answers))
    return reports.table(["model", "cache", "ready after, s", "first answers after that, s"], lines)


def _pictures(report: dict[str, Any]) -> list[str]:
    names = [f"{one} to {other}" for one, other in PAIRS]
    said = "Relative errors in the L2 norm of pixels; compiled to eager is what rounding in bf16 does by itself."
    lines = (
        (name, *(f"{errors[n]:.4f}" if n in errors else "" for n in names))
        for name, errors in report["pictures"].items()
    )
    return [said, "", *reports.table(["work", *names], lines)]


def _models(report: dict[str, Any]) -> list[str]:
    lines = []
    for made in report["models"]:
        sizes = ", ".join(f"{name} {size:g}" for name, size in made["gb"].items())
        lines.append((made["model"], sizes, *(f"{made[name]:.1f}" for name in ("build_s", "look_s", "save_s"))))
    return reports.table(["model", "GB", "made in, s", "looked at in, s", "saved in, s"], lines)
