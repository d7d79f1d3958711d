"""How long do requests wait under which policy? A simulation of one GPU; no GPU is needed.

Poisson arrivals of the mixes that vLLM-Omni benchmarks with, on times of Qwen-Image with guidance that were measured
on one H200. The scheduler and the cost model are the real ones, and learn from what they see; the other policies
know all times. Load 1 is what the GPU can do without merging.

A request is a forward that encodes, one for each step, and one that decodes; one forward runs at a time, and the next
decision falls when it is over (with measured times: when the next one had to be launched). Forwards take what the table
says for so many requests. Left out are what needs no device (of measured times it is added to each request), graphs and
proofs of the first ones, and who leaves or fails. bench/serving.py shows how far a server is from that.

    python bench/queueing.py [--requests 10000] [--runs 2] [--results bench/results]
    python bench/queueing.py --times FILE       with the times that a server learned, as with `sgld serve --calibrate`:
                                                its learned/times-*.json, or the folder that holds learned/
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import measured
from charts import line_chart
from policies import MAX_BATCH_SIZE, MIXES, POLICIES, SLO_SCALE, Class, Job, Policy, Sgld, play

LOADS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
# A tick takes longer than the table says, by this share in the mean (exponentially distributed).
NOISE = 0.01
# What was to be reached on mix C: load; against FIFO the mean, the share in time, the p95 of the largest class.
TARGETS = ((0.7, 1.5, 0.92, 1.65), (0.85, 1.85, 0.83, 1.9))


def arrivals(mix: Sequence[Class], load: float, num_requests: int, seed: int) -> list[Job]:
    """The same requests for every policy."""
    rng = random.Random(f"{len(mix)} {load} {seed}")
    mean_s = sum(of.share * of.alone_s for of in mix)
    classes = rng.choices(mix, [of.share for of in mix], k=num_requests)
    times = accumulate(rng.expovariate(load / mean_s) for _ in classes)
    return [Job(number, of, at) for number, (of, at) in enumerate(zip(classes, times, strict=True))]


def simulate(policy: Policy, jobs: Sequence[Job], noise: float = NOISE) -> None:
    """Run all jobs to their ends."""
    rng = random.Random(0)

    def tick_s(chosen: Sequence[Job]) -> float:
        return chosen[0].of.tick_s(chosen[0].stage, len(chosen)) * (1 + noise * rng.expovariate(1))

    play(policy, jobs, tick_s)


@dataclass(frozen=True)
class Point:
    """What came of one policy at one load, over all requests of all runs."""

    mix: str
    load: float
    policy: str
    mean_s: float
    p95_s: float
    slo: float
    """The share of requests that were done within 3 times what they take alone."""
    p95_by_class: dict[str, float]
    decision_us: float | None
    """Of the real scheduler: the mean of admission and choice."""


def point(
    mix: str, load: float, name: str, num_requests: int, num_runs: int, *, classes: Sequence[Class] | None = None
) -> Point:
    """Simulate a mix, or these classes under its name.

    Each run begins with an empty queue, and with a scheduler that knows nothing.
    """
    jobs: list[Job] = []
    decisions_s: list[float] = []
    classes = classes or MIXES[mix]
    for seed in range(num_runs):
        policy = POLICIES[name]()
        some = arrivals(classes, load, num_requests, seed)
        simulate(policy, some)
        jobs += some
        decisions_s += policy.decision_s if isinstance(policy, Sgld) else []
    return Point(
        mix=mix,
        load=load,
        policy=name,
        mean_s=statistics.fmean(job.latency_s for job in jobs),
        p95_s=p95([job.latency_s for job in jobs]),
        slo=statistics.fmean(job.is_in_time for job in jobs),
        p95_by_class={of.name: p95([job.latency_s for job in jobs if job.of is of]) for of in classes},
        decision_us=1e6 * statistics.fmean(decisions_s) if decisions_s else None,
    )


def p95(values: Sequence[float]) -> float:
    return sorted(values)[int(0.95 * len(values))]


def crowded_us(num_running: int, mix: str = "C") -> float:
    """Microseconds of a decision while so many requests run: the median of those before the first one ends."""
    policy = Sgld(max_running_requests=num_running)
    jobs = arrivals(MIXES[mix], 1e6, num_running, 0)
    simulate(policy, jobs)
    # All have arrived and encoded after this many decisions, and none has ended yet.
    return 1e6 * statistics.median(policy.decision_s[num_running : num_running + 100])


def table(points: Sequence[Point], mix: str) -> list[str]:
    """The points of one mix in Markdown; seconds."""
    names = [of.name for of in MIXES[mix]]
    head = ["load", "policy", "mean", "against FIFO", "p95", "in time", *(f"p95 of {name}" for name in names)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for p in (p for p in points if p.mix == mix):
        fifo = next(q for q in points if (q.mix, q.load, q.policy) == (p.mix, p.load, "FIFO"))
        cells = [f"{p.load:g}", p.policy, f"{p.mean_s:.1f}", f"{fifo.mean_s / p.mean_s:.2f}x lower", f"{p.p95_s:.1f}"]
        cells += [f"{p.slo:.3f}", *(f"{p.p95_by_class[name]:.1f}" for name in names)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def against_targets(points: Sequence[Point]) -> list[str]:
    """What was to be reached on mix C, against FIFO."""
    lines = ["| load | on mix C | wanted | sgld | oracle |", "|---|---|---|---|---|"]
    name = MIXES["C"][-1].name
    for load, mean, slo, largest in TARGETS:
        by_policy = {p.policy: p for p in points if (p.mix, p.load) == ("C", load)}
        fifo, ours = by_policy["FIFO"], (by_policy["sgld"], by_policy["oracle"])
        means = " | ".join(f"{fifo.mean_s / p.mean_s:.2f}x" for p in ours)
        tails = " | ".join(f"{p.p95_by_class[name] / fifo.p95_by_class[name]:.2f}x" for p in ours)
        lines += [
            f"| {load} | mean, lower by at least | {mean}x | {means} |",
            f"| {load} | in time, at least | {slo} | {' | '.join(f'{p.slo:.3f}' for p in ours)} |",
            f"| {load} | p95 of {name}, at most | {largest}x | {tails} |",
        ]
    return lines


def behind_oracle(points: Sequence[Point]) -> str:
    """Where the scheduler is furthest behind, or ahead by least, in both measures."""
    oracles = {(p.mix, p.load): p for p in points if p.policy == "oracle"}
    pairs = [(p, oracles[p.mix, p.load]) for p in points if p.policy == "sgld"]
    mean, best_mean = max(pairs, key=lambda pair: pair[0].mean_s / pair[1].mean_s)
    slo, best_slo = max(pairs, key=lambda pair: pair[1].slo - pair[0].slo)
    return (
        f"Against the oracle, which knows all times and lets nobody age, sgld is worst on mix {mean.mix} at load "
        f"{mean.load:g} by the mean ({mean.mean_s:.1f} s to {best_mean.mean_s:.1f} s), and on mix {slo.mix} at load "
        f"{slo.load:g} by the share in time ({slo.slo:.3f} to {best_slo.slo:.3f}). Ageing costs that; it shortens the "
        f"tail of the largest class."
    )


def report(points: Sequence[Point], crowds: dict[int, float], args: argparse.Namespace, took_s: float) -> str:
    """The results in Markdown."""
    machine = f"{platform.machine()}, Python {platform.python_version()}, {os.cpu_count()} cores"
    decisions = [p.decision_us for p in points if p.decision_us is not None]
    return "\n".join(
        [
            "# How long do requests wait under which policy?",
            "",
            f"`python bench/queueing.py`: {args.runs} runs of {args.requests} requests for each point, {took_s:.0f} s "
            f"of one core in all on {machine}. A simulation of one GPU with measured times; its docstring says which. "
            f'Seconds; "in time" is within {SLO_SCALE:g} times what a request takes alone. FIFO and EDF merge nothing.',
            "",
            "![mean](queueing_mean.svg) ![in time](queueing_slo.svg) ![largest class](queueing_largest.svg)",
            "",
            *against_targets(points),
            "",
            f"A decision takes {min(decisions):.0f} to {max(decisions):.0f} µs in the mean of a point; "
            + ", ".join(f"{us:.0f} µs with {n} requests running" for n, us in crowds.items())
            + ".",
            "",
            behind_oracle(points),
            "",
            *(line for mix in MIXES for line in (f"## Mix {mix}", "", *table(points, mix), "")),
        ]
    )


def charts(points: Sequence[Point], folder: Path) -> None:
    """Mix C: the mean, the share in time and the tail of the largest class, over the load."""
    largest = MIXES["C"][-1].name
    kinds: dict[str, tuple[str, Callable[[Point], float]]] = {
        "mean": ("mean latency, s", lambda p: p.mean_s),
        "slo": (f"share of requests within {SLO_SCALE:g} times their time alone", lambda p: p.slo),
        "largest": (f"p95 of {largest}, s", lambda p: p.p95_by_class[largest]),
    }
    for name, (label, value) in kinds.items():
        lines = {
            policy: [(p.load, value(p)) for p in points if (p.mix, p.policy) == ("C", policy)] for policy in POLICIES
        }
        chart = line_chart("Mix C on one GPU", "load", label, lines, is_log=name != "slo")
        (folder / f"queueing_{name}.svg").write_text(chart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="in each of the runs that make a point")
    parser.add_argument("--runs", type=int, default=2, help="for each point")
    parser.add_argument("--results", type=Path, help="folder of the report, its numbers and charts")
    parser.add_argument("--times", type=Path, help="take the times of forwards from this file of a server's")
    args = parser.parse_args()
    if args.times:
        learned = measured.read(args.times)
        MIXES.update({name: tuple(measured.classes(learned, mix, MAX_BATCH_SIZE)) for name, mix in MIXES.items()})
    points = []
    for mix in MIXES:
        for load in LOADS:
            for name in POLICIES:
                points.append(point(mix, load, name, args.requests, args.runs))
                print(f"{mix} {load} {name}: mean {points[-1].mean_s:.1f} s, in time {points[-1].slo:.3f}", flush=True)
    crowds = {n: crowded_us(n) for n in (20, 200)}
    text = report(points, crowds, args, time.process_time())
    print(text)
    if args.results:
        (args.results / "queueing.md").write_text(text)
        content = {"points": [asdict(p) for p in points], "decision_us_by_running": crowds}
        (args.results / "queueing.json").write_text(json.dumps(content, indent=1) + "\n")
        charts(points, args.results)


if __name__ == "__main__":
    main()
