"""Times that a server learned, as the simulation of bench/queueing.py wants them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import msgspec
from policies import Class

from sgld.engine.cost import CostModel, LearnedTime
from sgld.engine.demand import Profile
from sgld.engine.learned import Learned
from sgld.messages import CallKind


@dataclass(frozen=True)
class Measured(Class):
    """A class with measured times: seconds to encode, of a step by the requests in it, to decode, and of all else."""

    steps_s: tuple[float, ...] = ()
    text_s: float = 0.0
    pixels_s: float = 0.0
    way_s: float = 0.0
    leads_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Of encoding, a step, decoding."""

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
    taken = {(key, rows): cost.estimate(key, rows) for key, rows, *_ in learned.times}
    taken |= {(key, rows): elapsed_s for key, rows, _, elapsed_s in forwards}
    times: list[LearnedTime] = [(*call, "eager", elapsed_s) for call, elapsed_s in taken.items() if elapsed_s]
    return msgspec.structs.replace(learned, times=tuple(times))


def classes(
    learned: Learned,
    mix: Sequence[Class],
    max_rows: int,
    alone_s: Mapping[str, float] = MappingProxyType({}),
    leads_s: Mapping[str, float] = MappingProxyType({}),
) -> list[Measured]:
    """The mix with these times.

    :param alone_s: what a lone request of each class takes; beyond its forwards that is the rest.
    :param leads_s: by cost key, how long before the end of a forward it is decided what follows.
    :raises LookupError: a request of some class never ended, or a call of it was never timed.
    """
    cost = CostModel()
    cost.recall(learned.times)
    found = [_measured(of, *_profile(of, learned.profiles), cost, max_rows, leads_s) for of in mix]
    return [replace(of, way_s=max(alone_s.get(of.name, 0.0) - of.alone_s, 0.0)) for of in found]


def _measured(
    of: Class, profile: Profile, num_steps: int, cost: CostModel, max_rows: int, leads_s: Mapping[str, float]
) -> Measured:
    def seconds(kind: CallKind, requests: int = 1) -> float:
        """Of all calls of a kind, that so many requests make together."""
        total = 0.0
        for (its_kind, key, rows), number in profile.calls:
            if its_kind == kind:
                elapsed_s = cost.estimate(key, rows * requests)
                if elapsed_s is None:
                    raise LookupError(f"{key} with {rows * requests} rows was never timed")
                total += number * elapsed_s
        return total

    def lead_s(kind: CallKind) -> float:
        return max((leads_s.get(key, 0.0) for (its_kind, key, _), _ in profile.calls if its_kind == kind), default=0.0)

    steps = [seconds("denoise", requests) / num_steps for requests in range(1, max_rows + 1)]
    leads = lead_s("encode"), lead_s("denoise"), lead_s("decode")
    times = tuple(steps), seconds("encode"), seconds("decode")
    return Measured(of.side, of.num_steps, of.share, *times, leads_s=leads)


def _profile(of: Class, profiles: Sequence[Profile]) -> tuple[Profile, int]:
    """A request of that size and its number of steps: those of the class if there was one, else as of a calibration."""
    start = re.compile(rf"\({of.side}, {of.side}, 1, (\d+),")
    found = [(profile, int(match[1])) for profile in profiles if (match := start.match(profile.like))]
    if not found:
        raise LookupError(f"no request at {of.name} was completed")
    return next((pair for pair in reversed(found) if pair[1] == of.num_steps), found[-1])


def as_rows(mix: Sequence[Measured]) -> list[Mapping[str, object]]:
    """The times as plain values, in milliseconds."""
    return [
        {
            "class": of.name,
            "encode_ms": round(1e3 * of.encode_s, 2),
            "decode_ms": round(1e3 * of.decode_s, 2),
            "rest_ms": round(1e3 * of.rest_s, 2),
            "step_ms": [round(1e3 * s, 2) for s in of.steps_s],
        }
        for of in mix
    ]
