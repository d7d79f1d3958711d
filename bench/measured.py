"""Times that a server learned, as the simulation of bench/queueing.py wants them."""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import policies
from policies import MAX_BATCH_SIZE, Class
from ranks import lone_s

from sgld.engine.cost import CostModel, LearnedTime, degree_of
from sgld.engine.demand import Profile
from sgld.engine.learned import Learned
from sgld.messages import CallKind
from sgld.parallel import Ranks


@dataclass(frozen=True)
class Measured(Class):
    """A class with measured times: seconds to encode, of a step by the requests in it, to decode, and of all else."""

    steps_s: tuple[float, ...] = ()
    text_s: float = 0.0
    pixels_s: float = 0.0
    way_s: float = 0.0
    leads_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Of encoding, a step, decoding."""
    shared_s: Mapping[int, tuple[float | None, float | None]] = field(default_factory=dict, hash=False)
    """By the number of ranks: what a step of a request takes of so many, and decoding; None: these can't share it."""

    def tick_s(self, stage: int, rows: int, degree: int = 1) -> float:
        """What several ranks gain holds for any number of requests."""
        own_s, shared_s = super().tick_s(stage, rows), self._shared_s(stage, degree)
        return own_s if shared_s is None else own_s * shared_s / super().tick_s(stage, 1)

    def max_degree(self, stage: int) -> int:
        return max((degree for degree in self.shared_s if self._shared_s(stage, degree) is not None), default=1)

    def _shared_s(self, stage: int, degree: int) -> float | None:
        if stage == 0 or degree not in self.shared_s:
            return None
        return self.shared_s[degree][stage > self.num_steps]

    def step_s(self, rows: int) -> float:
        """Beyond what was measured each request costs as much as the last one did."""
        known = self.steps_s
        return known[rows - 1] if rows <= len(known) else known[-1] * rows / len(known)

    @property
    def encode_s(self) -> float:
        return self.text_s

    @property
    def decode_s(self) -> float:
        return self.pixels_s

    @property
    def rest_s(self) -> float:
        return self.way_s

    def lead_s(self, stage: int) -> float:
        return self.leads_s[min(stage, 1) + (stage > self.num_steps)]


def read(cache: Path) -> Learned:
    """What the server kept that had this folder for what it learns; or what is in this file of it.

    :raises FileNotFoundError: it kept nothing.
    """
    if cache.is_file():
        return msgspec.json.decode(cache.read_bytes(), type=Learned)
    files = sorted(cache.glob("learned/times-*.json"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"no times were learned in {cache}")
    return msgspec.json.decode(files[-1].read_bytes(), type=Learned)


def with_forwards(learned: Learned, forwards: Sequence[LearnedTime]) -> Learned:
    """What the server learned, with these times of forwards in the place of its own; none says how it ran."""
    cost = CostModel()
    cost.recall(learned.times)
    taken = {
        (key, rows): cost.predict(base, rows, degree)
        for key, rows, *_ in learned.times
        for base, degree in [degree_of(key)]
    }
    taken |= {(key, rows): elapsed_s for key, rows, _, elapsed_s in forwards}
    times: list[LearnedTime] = [(*call, "eager", elapsed_s) for call, elapsed_s in taken.items() if elapsed_s]
    return msgspec.structs.replace(learned, times=tuple(times))


def classes(
    learned: Learned,
    mix: Sequence[Class],
    max_rows: int,
    alone_s: Mapping[str, float] = MappingProxyType({}),
    leads_s: Mapping[str, float] = MappingProxyType({}),
    *,
    num_ranks: int = 1,
    gap_s: float = 0.0,
) -> list[Measured]:
    """The mix with these times.

    :param alone_s: what a lone request of each class takes; beyond its forwards that is the rest.
    :param leads_s: by cost key, how long before the end of a forward it is decided what follows.
    :param num_ranks: so many forwards may run side by side.
    :param gap_s: what passes before those.
    :raises LookupError: a request of some class never ended, or a call of it was never timed.
    """
    found = [_measured(of, *_profile(of, learned.profiles), learned, max_rows, leads_s) for of in mix]
    rests_s = [alone_s.get(of.name, 0.0) - lone_s(of, num_ranks, gap_s) for of in found]
    return [replace(of, way_s=max(rest_s, 0.0)) for of, rest_s in zip(found, rests_s, strict=True)]


def _measured(
    of: Class, profile: Profile, num_steps: int, learned: Learned, max_rows: int, leads_s: Mapping[str, float]
) -> Measured:
    cost, degrees = CostModel(), {degree_of(key) for key, *_ in learned.times}
    cost.recall(learned.times)

    def calls(kind: CallKind) -> list[tuple[str, int, int]]:
        return [(key, rows, number) for (its_kind, key, rows), number in profile.calls if its_kind == kind]

    def seconds(kind: CallKind, requests: int = 1) -> float:
        """Of all calls of a kind, that so many requests make together."""
        total = 0.0
        for key, rows, number in calls(kind):
            elapsed_s, own_s = cost.predict(key, rows * requests), cost.predict(key, rows) or cost.estimate(key, rows)
            if own_s is None:
                raise LookupError(f"{key} with {rows * requests} rows was never timed")
            # So many were never tried: each costs what one does.
            total += number * (elapsed_s or requests * own_s)
        return total

    def shared_s(kind: CallKind, degree: int, number_of_all: int) -> float | None:
        """The same of one request and several ranks; None: these never ran such a call."""
        if any((key, degree) not in degrees for key, *_ in calls(kind)):
            return None
        each = [(number, cost.predict(key, rows, degree)) for key, rows, number in calls(kind)]
        return sum(number * (elapsed_s or 0.0) for number, elapsed_s in each) / number_of_all

    def lead_s(kind: CallKind) -> float:
        return max((leads_s.get(key, 0.0) for key, *_ in calls(kind)), default=0.0)

    steps = [seconds("denoise", requests) / num_steps for requests in range(1, max_rows + 1)]
    leads = lead_s("encode"), lead_s("denoise"), lead_s("decode")
    times = tuple(steps), seconds("encode"), seconds("decode")
    several = sorted({degree for _, degree in degrees} - {1})
    shared = {degree: (shared_s("denoise", degree, num_steps), shared_s("decode", degree, 1)) for degree in several}
    return Measured(of.side, of.num_steps, of.share, *times, leads_s=leads, shared_s=shared)


def _profile(of: Class, profiles: Sequence[Profile]) -> tuple[Profile, int]:
    """A request of that size and its number of steps: those of the class if there was one, else as of a calibration."""
    start = re.compile(rf"\({of.side}, {of.side}, 1, (\d+),")
    found = [(profile, int(match[1])) for profile in profiles if (match := start.match(profile.like))]
    if not found:
        raise LookupError(f"no request at {of.name} was completed")
    return next((pair for pair in reversed(found) if pair[1] == of.num_steps), found[-1])


def gaps(of: Sequence[tuple[Ranks, float]]) -> dict[str, Any]:
    """What passed before forwards that waited for those of some ranks: in the mean, and by the ranks that ran them."""
    if not of:
        return {}
    by_ranks = {
        str(ranks): {"num": len(some), "mean_s": statistics.fmean(some), "median_s": statistics.median(some)}
        for ranks in sorted({ranks for ranks, _ in of}, key=lambda ranks: (ranks.num, ranks.first))
        for some in [[seconds for others, seconds in of if others == ranks]]
    }
    return {"gap_s": statistics.fmean(seconds for _, seconds in of), "gaps": by_ranks}


def mix_of(report: Mapping[str, Any]) -> list[Measured]:
    """The mix of a report of bench/serving.py, with what was measured there."""
    mix = policies.mix_of(report["mix"], report["steps"])
    learned = msgspec.convert(report["learned"], Learned)
    alone_s, num_ranks = report.get("lone_s", report["alone_s"]), report.get("num_ranks", 1)
    gap_s = report.get("gap_s", 0.0)
    return classes(learned, mix, MAX_BATCH_SIZE, alone_s, report["leads_s"], num_ranks=num_ranks, gap_s=gap_s)


def as_rows(mix: Sequence[Measured]) -> list[Mapping[str, object]]:
    """The times as plain values, in milliseconds."""
    return [
        {
            "class": of.name,
            "encode_ms": round(1e3 * of.encode_s, 2),
            "decode_ms": round(1e3 * of.decode_s, 2),
            "rest_ms": round(1e3 * of.rest_s, 2),
            "step_ms": [round(1e3 * s, 2) for s in of.steps_s],
            "shared_ms": {
                degree: [None if s is None else round(1e3 * s, 2) for s in both] for degree, both in of.shared_s.items()
            },
        }
        for of in mix
    ]
