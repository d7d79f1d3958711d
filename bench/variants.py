"""What should a scheduler expect of a number of rows that has no CUDA graph yet? A simulation; no GPU is needed.

A forward runs eagerly until its shape was seen three times; then it is captured, compared once and replayed. The times
are those of SDXL with guidance on one H200, whose host launches slowly: at 512² one graph of a pair takes 16.7 ms, of
four pairs 36.8 ms, an eager forward 102 to 128 ms whatever its rows. Three ways to price rows that aren't captured:

    one median    all runs of a number of rows are alike, whatever way they ran in
    as it is      as they ran last
    as it will be as the curve of sgld/engine/curve.py has it: in proportion to what other rows gained, for five runs

    python bench/variants.py [--requests 2000]
"""

import argparse
import bisect
import random
import statistics
from collections import Counter
from collections.abc import Sequence

from policies import Class, Job, Sgld, cost_key, play
from queueing import p95

import sgld.engine.curve as curve
from sgld.messages import Variant

# Rows, that is pairs of guidance, to seconds: eager and as a graph.
EAGER = {512: {1: 0.102, 4: 0.128, 8: 0.145, 16: 0.200}, 1024: {1: 0.128, 4: 0.153, 8: 0.279, 16: 0.558}}
GRAPH = {512: {1: 0.0167, 4: 0.0368, 8: 0.0690, 16: 0.135}, 1024: {1: 0.0413, 4: 0.1395, 8: 0.279, 16: 0.558}}
MIX = (Class(512, 20, 0.7), Class(1024, 25, 0.3))
CAPTURES_AFTER = 3
LOADS = (0.5, 0.8, 1.1)
DECODE_S = {512: 0.01, 1024: 0.04}


def seconds(of: Class, rows: int, table: dict[int, dict[int, float]]) -> float:
    known = sorted(table[of.side].items())
    right = min(max(bisect.bisect_left(known, (rows,)), 1), len(known) - 1)
    (low, low_s), (high, high_s) = known[right - 1 : right + 1]
    return low_s + (high_s - low_s) * (rows - low) / (high - low)


class Device:
    """Captures what comes again, and says how long a forward takes and how it ran."""

    def __init__(self) -> None:
        self._uses: Counter[tuple[int, int]] = Counter()

    def run(self, job: Job, rows: int) -> tuple[float, Variant | None]:
        """Seconds, and how it ran; None: once in this way."""
        if not job.is_denoising:
            return (0.01 if job.stage == 0 else DECODE_S[job.of.side]), "eager"
        self._uses[job.of.side, rows] += 1
        uses = self._uses[job.of.side, rows]
        eager_s, graph_s = seconds(job.of, rows, EAGER), seconds(job.of, rows, GRAPH)
        if uses < CAPTURES_AFTER:
            return eager_s, "eager"
        if uses == CAPTURES_AFTER:
            return 3 * eager_s, None
        if uses == CAPTURES_AFTER + 1:
            return eager_s + graph_s, None
        return graph_s, "graph"


class Pricing(Sgld):
    """The real scheduler; what it is told of how forwards ran is a matter of the pricing."""

    def __init__(self, tells_variants: bool) -> None:
        super().__init__()
        self._tells_variants = tells_variants
        self.variant: Variant | None = "eager"
        """How the forward ran that is over; None: its time isn't that of its kind."""

    def _learn(self, ran: Job, rows: int, elapsed_s: float) -> None:
        if self.variant is not None:
            variant = self.variant if self._tells_variants else "eager"
            self._cost.observe(cost_key(ran, ran.stage - 1), rows, elapsed_s, variant)


def simulate(policy: Pricing, jobs: Sequence[Job]) -> Counter[int]:
    """Run all jobs to their ends; how many forwards of steps had so many rows."""
    device, sizes = Device(), Counter[int]()

    def tick_s(chosen: Sequence[Job]) -> float:
        elapsed_s, policy.variant = device.run(chosen[0], len(chosen))
        sizes[len(chosen)] += chosen[0].is_denoising
        return elapsed_s

    play(policy, jobs, tick_s)
    return sizes


def arrivals(load: float, num_requests: int) -> list[Job]:
    """Load 1: what graphs of one row can do."""
    rng, at = random.Random(int(100 * load)), 0.0
    mean_s = sum(of.share * (of.num_steps * GRAPH[of.side][1] + DECODE_S[of.side]) for of in MIX)
    jobs = []
    for number in range(num_requests):
        at += rng.expovariate(load / mean_s)
        jobs.append(Job(number, rng.choices(MIX, [of.share for of in MIX])[0], at))
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    args = parser.parse_args()
    patience = curve.PATIENCE
    print("| load | priced | mean, s | p95, s | first 100, mean s | rows of a forward |\n" + "|---" * 6 + "|")
    for load in LOADS:
        for name, tells, runs in (
            ("one median", False, patience),
            ("as it is", True, 0),
            ("as it will be", True, patience),
        ):
            curve.PATIENCE = runs
            jobs = arrivals(load, args.requests)
            sizes = simulate(Pricing(tells), jobs)
            taken = [job.latency_s for job in jobs]
            rows = sum(n * number for n, number in sizes.items()) / sum(sizes.values())
            print(
                f"| {load:g} | {name} | {statistics.fmean(taken):.3f} | {p95(taken):.3f} "
                f"| {statistics.fmean(taken[:100]):.3f} | {rows:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
