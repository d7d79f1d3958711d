"""What bench/overhead.py measured: numbers of each run, and the report."""

import statistics
from collections.abc import Sequence
from typing import Any

import msgspec
import reports


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One way of running a model, a number for each run: milliseconds, of steps the median."""

    step_ms: list[float]
    """From one forward of the denoiser to the next."""
    forward_ms: list[float]
    outside_ms: list[float]
    """From the end of a forward to the next one."""
    lost: list[float]
    """The share of denoising in which no forward ran."""
    picture_ms: list[float]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A model; runs with the same index came one after the other.

    `device_ms`: of a forward, what the device needs by itself; None: the host is the device. `launch_ms`: what the host
    needs to launch one. `graphs`: the engine with CUDA graphs. `added_cpu_ms`: CPU time of front and rank, for a step.
    """

    name: str
    device_ms: float | None
    launch_ms: float | None
    bare: Way
    engine: Way
    graphs: Way | None = None
    added_cpu_ms: list[float]

    @property
    def bound_by(self) -> str:
        """What a forward waits for."""
        if self.device_ms is None or self.launch_ms is None:
            return "CPU"
        return "device" if self.launch_ms < self.device_ms else "host"

    @property
    def added_outside_ms(self) -> list[float]:
        """What the engine adds between the forwards of each run."""
        return [ours - bare for ours, bare in zip(self.engine.outside_ms, self.bare.outside_ms, strict=True)]


def joined(processes: Sequence[Sequence[Row]]) -> list[Row]:
    """The runs of all processes, by model."""

    def one(rows: Sequence[Row]) -> Row:
        graphs = [row.graphs for row in rows if row.graphs is not None]
        return msgspec.structs.replace(
            rows[0],
            bare=_joined_ways([row.bare for row in rows]),
            engine=_joined_ways([row.engine for row in rows]),
            graphs=_joined_ways(graphs) if graphs else None,
            added_cpu_ms=[value for row in rows for value in row.added_cpu_ms],
        )

    return [one(rows) for rows in zip(*processes, strict=True)]


def _joined_ways(ways: Sequence[Way]) -> Way:
    return Way(**{name: [v for way in ways for v in getattr(way, name)] for name in Way.__struct_fields__})


def shares(ours: Sequence[float], bare: Sequence[float]) -> list[float]:
    """What is added to each run, in percent."""
    return [100 * (one / other - 1) for one, other in zip(ours, bare, strict=True)]


def text(processes: Sequence[Sequence[Row]], report: dict[str, Any]) -> str:
    """The report for people."""
    lines = ["# What does the engine add to a bare pipeline?", "", f"`{report['command']}`", ""]
    lines += [f"{report['machine']}; {reports.versions(report)}. Load of the machine: {report['load']}."]
    lines += [f"A tick whose forward takes no time adds {report['tick_cpu_ms']:.2f} ms of CPU time, front and rank."]
    rows = joined(processes) if processes else []
    if not rows:
        return "\n".join(lines) + "\n"
    num = f"{len(rows[0].bare.step_ms)} runs of each in {len(processes)} process" + "es" * (len(processes) > 1)
    lines += [f"Medians of {num}, and from the least to the most; of a run's steps the median. Milliseconds.", ""]
    lines += ["Wanted of steps of 40 ms and more: at most 3 % of wall time added, and 3 % of the device lost.", ""]
    lines += ["## Whole steps", "", *_steps(rows), ""]
    if any(row.bound_by == "device" for row in rows):
        lines += [
            "Where the device is, the host of the plain pipeline waits spinning and a rank sleeps: that is what CPU"
        ]
        lines += ["time is less by.", ""]
    if any(row.bound_by == "host" for row in rows):
        lines += [
            "Where the host is, the same forward takes a third more or less from run to run and process to process,"
        ]
        lines += ["and so do steps and pictures: there the next table tells what the engine adds.", ""]
    lines += ["## Outside of forwards", "", *_outside(rows), ""]
    if any(row.graphs for row in rows):
        lines += ["## With CUDA graphs", "", *_graphs(rows), ""]
    return "\n".join(lines)


def _steps(rows: Sequence[Row]) -> list[str]:
    head = ["model", "bound by", "device, of a forward", "launching it", "step, bare", "step, engine"]
    head += ["added to a step", "to a picture", "CPU time added to a step"]
    cells = [
        [
            row.name,
            row.bound_by,
            *("" if value is None else f"{value:.2f}" for value in (row.device_ms, row.launch_ms)),
            _spread(row.bare.step_ms),
            _spread(row.engine.step_ms),
            _percent(shares(row.engine.step_ms, row.bare.step_ms)),
            _percent(shares(row.engine.picture_ms, row.bare.picture_ms)),
            _spread(row.added_cpu_ms),
        ]
        for row in rows
    ]
    return reports.table(head, cells)


def _outside(rows: Sequence[Row]) -> list[str]:
    head = ["model", "bound by", "bare", "engine", "added", "of a bare step"]
    head += ["of the device lost, bare", "engine", "forward, bare", "engine"]
    cells = [
        [
            row.name,
            row.bound_by,
            _spread(row.bare.outside_ms),
            _spread(row.engine.outside_ms),
            _spread(row.added_outside_ms),
            _percent([100 * a / b for a, b in zip(row.added_outside_ms, row.bare.step_ms, strict=True)]),
            _percent([100 * value for value in row.bare.lost]),
            _percent([100 * value for value in row.engine.lost]),
            _spread(row.bare.forward_ms),
            _spread(row.engine.forward_ms),
        ]
        for row in rows
    ]
    return reports.table(head, cells)


def _graphs(rows: Sequence[Row]) -> list[str]:
    head = [
        "model",
        "step, bare",
        "step, engine",
        "outside of forwards",
        "of the device lost",
        "picture, bare",
        "engine",
    ]
    cells = [
        [
            row.name,
            _spread(row.bare.step_ms),
            _spread(row.graphs.step_ms),
            _spread(row.graphs.outside_ms),
            _percent([100 * value for value in row.graphs.lost]),
            _spread(row.bare.picture_ms, 0),
            _spread(row.graphs.picture_ms, 0),
        ]
        for row in rows
        if row.graphs is not None
    ]
    return reports.table(head, cells)


def _percent(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} % ({min(values):.1f} to {max(values):.1f})"


def _spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
