"""What forwards took of a server's device, by the trace that it wrote (`--trace`)."""

import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from sgld.engine.cost import LearnedTime, at_degree
from sgld.engine.trace import track_of
from sgld.parallel import FIRST, Ranks

# The process of ticks in a trace.
_RANKS = 1
# One that begins later after another one hasn't waited for it.
_NEXT_S = 0.002


@dataclass(frozen=True)
class Tick:
    """A forward: when it began and ended, by time.monotonic, and whose calls it ran."""

    start_s: float
    end_s: float
    cost_key: str
    rows: int
    requests: tuple[str, ...]
    lead_s: float
    """So long before it began, while the device was busy, it was chosen and its launch began."""
    is_proof: bool
    ranks: Ranks = FIRST
    """Those that ran it, where each forward has its own."""


@dataclass(frozen=True)
class Trace:
    """The ticks of one replica in order, and when each request came."""

    ticks: Sequence[Tick]
    arrived_s: Mapping[str, float]

    @property
    def num_ranks(self) -> int:
        """So many forwards may run side by side."""
        return max((tick.ranks.first + tick.ranks.num for tick in self.ticks), default=1)


def file_of(path: Path) -> Path:
    """Where a trace is: while it is written it lies beside its place."""
    return path if path.exists() else path.with_name(f".{path.name}.tmp")


def read(path: Path) -> Trace:
    """A trace, or what there is of it while it is written.

    :raises FileNotFoundError: there is none.
    """
    lines = file_of(path).read_text().splitlines()
    spans = [event for line in lines if (event := _event(line)) is not None and event["ph"] == "X"]
    # Where several ranks run one, it is on the track of each of them.
    ticks = list({span["args"]["tick"]: _tick(span) for span in spans if span["pid"] == _RANKS}.values())
    came_s = {span["tid"]: span["ts"] / 1e6 for span in spans if span["name"] == "queued"}
    names = {name for tick in ticks for name in tick.requests if track_of(name) in came_s}
    return Trace(sorted(ticks, key=lambda tick: tick.start_s), {name: came_s[track_of(name)] for name in names})


def _event(line: str) -> dict[str, Any] | None:
    try:
        return msgspec.json.decode(line.strip(","), type=dict[str, Any])
    except msgspec.DecodeError:
        return None  # a bracket, or the last line of a trace that has no end


def _tick(span: Mapping[str, Any]) -> Tick:
    args, start_s = span["args"], span["ts"] / 1e6
    requests = tuple(dict.fromkeys(args["requests"]))
    end_s = start_s + span["dur"] / 1e6
    is_proof = args["mode"] == "proof"
    ranks = _ranks(args.get("ranks", ""))
    return Tick(start_s, end_s, args["cost_key"], args["rows"], requests, args["lead_us"] / 1e6, is_proof, ranks)


def _ranks(said: str) -> Ranks:
    """What a trace says of them."""
    numbers = [int(number) for number in re.findall(r"\d+", said)] or [0]
    return Ranks(numbers[0], numbers[-1] - numbers[0] + 1)


def forwards(trace: Trace, since_s: float = 0.0) -> list[LearnedTime]:
    """What they took, by cost key (that of the ranks that shared them) and rows: the mean.

    Of those that all ranks run, with what passed until the next one while there was work. On a CPU that is a few
    milliseconds; a GPU is given the next one before it is done. What some took longer than others, as when the host
    wasn't ahead, others had to wait for, too. What passes before forwards side by side `gaps_s` says.
    """
    taken: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for tick, seconds in _occupied(trace):
        if tick.start_s >= since_s and not tick.is_proof:
            taken[at_degree(tick.cost_key, tick.ranks.num), tick.rows].append(seconds)
    return [(key, rows, "eager", statistics.fmean(some)) for (key, rows), some in sorted(taken.items())]


def leads_s(trace: Trace) -> dict[str, float]:
    """How long before their ends it was decided what follows those that all ranks run, by cost key: the median."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for tick, after in pairwise(trace.ticks):
        is_next = after.start_s - tick.end_s < _NEXT_S and {tick.ranks.num, after.ranks.num} == {trace.num_ranks}
        if is_next and not tick.is_proof:
            found[tick.cost_key].append(after.lead_s)
    return {key: statistics.median(some) for key, some in found.items()}


def gaps_s(trace: Trace, since_s: float = 0.0) -> list[tuple[Ranks, float]]:
    """What passed between the end of a forward of some ranks and the begin of the one that waited for it.

    It waited for the last of: the forward before it on each of its ranks, those of its own requests, and their arrival.

    :return: with the ranks that ran the one that waited.
    """
    on_rank: dict[int, Tick] = {}
    of_request: dict[str, Tick] = {}
    found = []
    for tick in trace.ticks:
        before = [on_rank[rank] for rank in tick.ranks.every if rank in on_rank]
        before += [of_request[name] for name in tick.requests if name in of_request]
        last = max(before, key=lambda each: each.end_s, default=tick)
        came_s = max((trace.arrived_s.get(name, 0.0) for name in tick.requests), default=0.0)
        is_known = last is not tick and last.ranks.num < trace.num_ranks and came_s < last.end_s
        if is_known and last.start_s >= since_s and not last.is_proof and not tick.is_proof:
            found.append((tick.ranks, tick.start_s - last.end_s))
        on_rank.update(dict.fromkeys(tick.ranks.every, tick))
        of_request.update(dict.fromkeys(tick.requests, tick))
    return found


def _occupied(trace: Trace) -> Iterator[tuple[Tick, float]]:
    last_s = {name: tick.end_s for tick in trace.ticks for name in tick.requests}
    for tick, after in pairwise(trace.ticks):
        has_work = any(at <= tick.end_s < last_s[name] for name, at in trace.arrived_s.items())
        is_by_all = tick.ranks.num == trace.num_ranks
        yield tick, (after.start_s if has_work and is_by_all else tick.end_s) - tick.start_s
    for tick in trace.ticks[-1:]:
        yield tick, tick.end_s - tick.start_s
