"""How far a server is from the simulation of the same arrivals, request by request."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import policies
import queueing
import ranks
from measured import Measured

_SIMULATED = ("FIFO", "sgld")
_LOADS = (0.5, 0.7, 0.85)


@dataclass
class Asked:
    """One request: when it was sent, by the clock of the trace, and what came of it."""

    kind: str
    arrives_at: float
    latency_s: float = 0.0
    status: int = 0
    """Of HTTP; 0 while there is no answer."""

    @property
    def is_done(self) -> bool:
        return self.status == 200


def percentile(ordered: Sequence[float], percent: int) -> float:
    """Of values in order: the least that so many per cent don't exceed."""
    return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)]


def simulated(asked: Sequence[Asked], mix: Sequence[Measured], num_ranks: int = 1, gap_s: float = 0.0) -> list[float]:
    """Latencies of the same arrivals in the simulation, by a scheduler that has served such requests before."""
    by_name = {of.name: of for of in mix}
    jobs = [policies.Job(number, by_name[one.kind], one.arrives_at) for number, one in enumerate(asked)]
    ranks.play(ranks.copies_of(1, num_ranks, gap_s=gap_s, known=mix), jobs)
    return [job.latency_s for job in jobs]


def against_simulation(
    asked: Sequence[Asked], mix: Sequence[Measured], num_ranks: int = 1, gap_s: float = 0.0
) -> dict[str, Any]:
    """The difference of each request that was answered, and of means and tails, by class and of all."""
    expected_s = simulated(asked, mix, num_ranks, gap_s)
    pairs = [(one.kind, one.latency_s, s) for one, s in zip(asked, expected_s, strict=True) if one.is_done]
    differences = sorted(abs(seen / expected - 1) for _, seen, expected in pairs)
    by_class = {
        name: _differs([(seen, expected) for kind, seen, expected in pairs if name in ("all", kind)])
        for name in (*(of.name for of in mix if any(of.name == kind for kind, *_ in pairs)), "all")
    }
    return {
        "median_difference": percentile(differences, 50),
        "p90_difference": percentile(differences, 90),
        "by_class": by_class,
        "expected_s": expected_s,
    }


def _differs(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    seen, expected = ([pair[i] for pair in pairs] for i in (0, 1))
    return {
        "num": len(pairs),
        "mean_s": {"measured": statistics.fmean(seen), "simulated": statistics.fmean(expected)},
        "mean_differs": statistics.fmean(seen) / statistics.fmean(expected) - 1,
        "p95_differs": percentile(sorted(seen), 95) / percentile(sorted(expected), 95) - 1,
    }


def claim(mix: Sequence[Measured], num_requests: int) -> list[dict[str, Any]]:
    """What the simulation says of many requests with these times."""
    return [
        asdict(queueing.point("measured", load, name, num_requests, 1, classes=mix))
        for load in _LOADS
        for name in _SIMULATED
    ]


def text(found: Mapping[str, Any]) -> list[str]:
    """For people: the agreement, the claim, and the times that both are made of."""
    simulation = found["simulation"]
    everything = simulation["by_class"]["all"]
    lines = [
        f"The simulation of the same arrivals, with the times of forwards that were measured meanwhile, has a mean of "
        f"{everything['mean_s']['simulated']:.2f} s; measured were {everything['mean_s']['measured']:.2f} s "
        f"({everything['mean_differs']:+.1%}). Request by request the difference is "
        f"{simulation['median_difference']:.1%} in the median, {simulation['p90_difference']:.1%} at p90.",
        "",
        "| class | answered | mean, simulated | mean | differs | p95 differs |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {of['num']} | {of['mean_s']['simulated']:.2f} | {of['mean_s']['measured']:.2f} | "
        f"{of['mean_differs']:+.1%} | {of['p95_differs']:+.1%} |"
        for name, of in simulation["by_class"].items()
    ]
    if found["claim"]:
        lines += ["", "| load, simulated | policy | mean | p95 | in time |", "|---|---|---|---|---|"]
    lines += [
        f"| {p['load']:g} | {p['policy']} | {p['mean_s']:.2f} | {p['p95_s']:.2f} | {p['slo']:.3f} |"
        for p in found["claim"]
    ]
    return [*lines, *_times(found["times"]), *_gaps(found.get("gaps", {}))]


def _times(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What forwards took, on one GPU and on several."""
    degrees = list(rows[0]["shared_ms"])
    head = ["class", "encode, ms", "decode, ms", "beside the device, ms", "a step of 1, 2, ... requests, ms"]
    head += [f"{stage} on {degree} GPUs, ms" for stage in ("a step", "decode") for degree in degrees]
    lines = ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        shared = [row["shared_ms"][degree][at] for at in (0, 1) for degree in degrees]
        cells = [row["class"], *(f"{row[key]:.1f}" for key in ("encode_ms", "decode_ms", "rest_ms"))]
        cells += [", ".join(f"{ms:.1f}" for ms in row["step_ms"][:4])]
        cells += ["" if ms is None else f"{ms:.1f}" for ms in shared]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _gaps(gaps: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What passed before forwards that waited for others."""
    if not gaps:
        return []
    lines = [
        "",
        "Before forwards that waited for one of some ranks, as only those of all ranks are launched ahead:",
        "",
    ]
    lines += ["| on | number | gap, mean, ms | median, ms |", "|---|---|---|---|"]
    return lines + [
        f"| {on} | {of['num']} | {1e3 * of['mean_s']:.2f} | {1e3 * of['median_s']:.2f} |" for on, of in gaps.items()
    ]
