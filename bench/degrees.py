"""How many GPUs should share a forward: always all, never any, or what pays for each? A simulation; no GPU is needed.

Mix C on four GPUs, from a table of t(size, rows, degree): that of bench/flux_on_h200.json, or what
`python bench/serving.py --elastic 4 --out FILE` or `python bench/parallel.py --out FILE` measured. The schedulers and
cost models are the real ones, and learn from what they see.

    sp 4      one copy of the model; all GPUs share the tokens of each forward
    dp 4      four copies; requests go to the one that is done with them first, as in the engine
    elastic   one copy; the scheduler chooses for each forward

Load 1 is what four GPUs can do, each for itself. Where forwards have ranks of their own none is launched ahead of time:
each begins some time after the one that it waited for. Launched ahead, it takes no time that passes. Text is encoded on
the first GPU.

With the report of `bench/serving.py --elastic 4` as its table, all of that was measured: forwards, the gap between
them, and what requests take beside these. Other tables don't have everything: a further row costs what the largest
known number costs for each; or, on several GPUs, that in proportion to what these gain. Decoding is shared with 0.8 of
what it could gain. The gap is GAP_S; as that is a guess, "elastic" comes with smaller ones, too.

    python bench/degrees.py [--table bench/flux_on_h200.json] [--requests 10000] [--results bench/results]
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import measured
from charts import line_chart
from policies import MIXES, Class, mix_of
from queueing import NOISE, arrivals, p95
from ranks import Copy, copies_of, play

TABLE = Path(__file__).with_name("flux_on_h200.json")
LOADS = (0.3, 0.5, 0.7, 0.85, 0.95)
NUM_GPUS = 4
# Telling the front, its decision, and the steps of noise schedulers: not measured.
GAP_S = 0.003
GAPS_S = (0.0, 0.0015)
"""What it might be, too, at these loads:"""
GAP_LOADS = (0.85, 0.95)
DECODE_GAIN = 0.8
Known = Mapping[tuple[int, int], Mapping[int, float]]
"""Side and degree to seconds by rows."""


@dataclass(frozen=True)
class Shared(Class):
    """Requests of one size, whose steps take what the table says."""

    known: Known = field(default_factory=dict, hash=False)

    def step_s(self, rows: int) -> float:
        return self.shared_step_s(rows, 1)

    def shared_step_s(self, rows: int, degree: int) -> float:
        """Seconds of a step of so many requests on so many GPUs."""
        own = self.known[self.side, degree]
        if rows in own:
            return own[rows]
        one = self.known[self.side, 1]
        largest = max(one)
        further_s = (one[largest] - one[1]) / (largest - 1) if largest > 1 else one[1]
        return own[1] * (1 + (rows - 1) * further_s / one[1])

    def tick_s(self, stage: int, rows: int, degree: int = 1) -> float:
        if 0 < stage <= self.num_steps:
            return self.shared_step_s(rows, degree)
        gain = 1 + DECODE_GAIN * (degree - 1) if stage else 1.0
        return super().tick_s(stage, rows) / gain

    def max_degree(self, stage: int) -> int:
        return NUM_GPUS if stage else 1


@dataclass(frozen=True)
class Table:
    """What forwards take; `gaps_s`: before those of some GPUs, as it was measured or what it might be."""

    mix: Sequence[Class]
    gaps_s: Sequence[float]
    modelled: Sequence[str]
    """What isn't measured of it."""

    def ways(self, load: float) -> dict[str, Callable[[], list[Copy]]]:
        """All that is compared at a load, by name."""
        gap_s, *others = self.gaps_s
        elastic = {f"elastic, gap {1000 * other:g} ms": other for other in others if load in GAP_LOADS}
        return {
            f"sp {NUM_GPUS}": partial(copies_of, 1, 1, NUM_GPUS, noise=NOISE),
            f"dp {NUM_GPUS}": partial(copies_of, NUM_GPUS, 1, 1, noise=NOISE),
            **{
                name: partial(copies_of, 1, NUM_GPUS, gap_s=each, noise=NOISE)
                for name, each in {"elastic": gap_s, **elastic}.items()
            },
        }


def read(path: Path) -> Table:
    """A table.

    :raises ValueError: it is of another number of GPUs.
    """
    content = json.loads(path.read_text())
    if "learned" in content:
        return _of_replay(content)
    known: dict[tuple[int, int], dict[int, float]] = {}
    for row in content["rows"]:
        known.setdefault((row["side"], row["degree"]), {})[row["rows"]] = row["seconds"]
    modelled = [f"{r['side']}² on {r['degree']} ({r['modelled']})" for r in content["rows"] if "modelled" in r]
    mix = [Shared(of.side, of.num_steps, of.share, known) for of in MIXES["C"]]
    return Table(mix, (GAP_S, *GAPS_S), modelled)


def _of_replay(report: Mapping[str, Any]) -> Table:
    """With whole requests, however many of their steps the replay had."""
    if report["num_ranks"] != NUM_GPUS:
        raise ValueError(f"the table is of {report['num_ranks']} GPUs, not of {NUM_GPUS}")
    mix = [
        replace(of, num_steps=whole.num_steps)
        for of, whole in zip(measured.mix_of(report), mix_of(report["mix"]), strict=True)
    ]
    degrees = [2**n for n in range(1, NUM_GPUS.bit_length())]
    modelled = [
        f"{of.name} on {n} (as on one)" for of in mix for n in degrees if of.shared_s.get(n, (None,))[0] is None
    ]
    return Table(mix, (report["gap_s"],), modelled)


@dataclass(frozen=True)
class Point:
    """What came of one way at one load."""

    load: float
    way: str
    mean_s: float
    p95_s: float
    slo: float
    """The share of requests that were done within 3 times what they take alone on one GPU."""
    p95_by_class: dict[str, float]


def point(table: Table, load: float, way: str, num_requests: int) -> Point | None:
    """Simulate; None: it is more than can be done so."""
    mix = table.mix
    jobs = arrivals(mix, NUM_GPUS * load, num_requests, 0)
    if way.startswith("sp") and _needed(mix, load) > 1:
        return None
    play(table.ways(load)[way](), jobs)
    latencies = [job.latency_s for job in jobs]
    by_class = {of.name: p95([job.latency_s for job in jobs if job.of is of]) for of in mix}
    slo = statistics.fmean(job.is_in_time for job in jobs)
    return Point(load, way, statistics.fmean(latencies), p95(latencies), slo, by_class)


def _needed(mix: Sequence[Class], load: float) -> float:
    """How busy all GPUs are together, if each forward is shared by all of them."""
    alone = sum(of.share * of.alone_s for of in mix)
    shared = sum(of.share * sum(of.tick_s(stage, 1, NUM_GPUS) for stage in range(of.num_steps + 2)) for of in mix)
    return load * NUM_GPUS * shared / alone


def text_of(points: Sequence[Point], table: Table, args: argparse.Namespace) -> str:
    names = list(points[0].p95_by_class)
    head = ["load", "way", "mean", "p95", "in time", *(f"p95 of {name}" for name in names)]
    lines = [
        "# How many GPUs should share a forward?",
        "",
        f"`python bench/degrees.py --table {args.table.name}`: a simulation of four GPUs, {args.requests} requests of "
        'mix C for each point; its docstring says how. Seconds; "in time" is within 3 times what a request takes alone '
        "on one GPU. Where a way is missing, requests are more than it can do. A gap of "
        f"{1000 * table.gaps_s[0]:.2g} ms comes before each forward that isn't launched ahead, where no other one is "
        f"named. Of the table these times are no measurements: {'; '.join(table.modelled) or 'none'}.",
        "",
        "![mean](degrees_mean.svg)",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for p in points:
        cells = [
            f"{p.load:g}",
            p.way,
            f"{p.mean_s:.2f}",
            f"{p.p95_s:.2f}",
            f"{p.slo:.3f}",
            *(f"{p.p95_by_class[n]:.2f}" for n in names),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--requests", type=int, default=10_000, help="for each point")
    parser.add_argument("--results", type=Path, help="folder of the report, its numbers and chart")
    args = parser.parse_args()
    table, points = read(args.table), []
    for load in LOADS:
        for way in table.ways(load):
            if (found := point(table, load, way, args.requests)) is not None:
                points.append(found)
                print(f"{load} {way}: mean {found.mean_s:.2f} s, p95 {found.p95_s:.2f}", flush=True)
    text = text_of(points, table, args)
    print(text)
    if args.results:
        (args.results / "degrees.md").write_text(text)
        (args.results / "degrees.json").write_text(json.dumps({"points": [asdict(p) for p in points]}, indent=1) + "\n")
        lines = {way: [(p.load, p.mean_s) for p in points if p.way == way] for way in table.ways(0.0)}
        chart = line_chart("Mix C on four GPUs", "load", "mean latency, s", lines, is_log=True)
        (args.results / "degrees_mean.svg").write_text(chart)


if __name__ == "__main__":
    main()
