"""How the server does at a moment: a pure function of the engine's counters then and a moment before."""

from collections.abc import Iterable

import msgspec

from sgld.engine.statistics import CallStatistics, Statistics
from sgld.messages import CallKind


class ServerStats(msgspec.Struct, frozen=True, kw_only=True):
    """All requests of the server, of everybody; rates are of the last second or so."""

    time: float
    uptime_s: float
    num_queued: int
    num_running: int
    num_completed: int
    num_failed: int
    num_cancelled: int
    num_restarts: int
    batch_size: float
    """Steps that shared a forward, on average; 0 where none ran."""
    steps_per_s: float
    busy: float
    """Part of the time in which a forward ran, from 0 to 1: the mean of all replicas."""


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """What a chart needs of ServerStats."""

    time: float
    num_queued: int
    num_running: int
    batch_size: float
    steps_per_s: float
    busy: float


def stats_after(before: Statistics, now: Statistics, time: float) -> ServerStats:
    """The server at a moment.

    :param before: what the engine said a moment ago.
    :param time: seconds since 1970.
    """
    took_s = max(now.uptime_s - before.uptime_s, 1e-6)
    steps = _num(now.calls, "denoise") - _num(before.calls, "denoise")
    ticks = _num(now.calls, "denoise", "num_ticks") - _num(before.calls, "denoise", "num_ticks")
    elapsed_s = sum(call.elapsed_s for call in now.calls) - sum(call.elapsed_s for call in before.calls)
    return ServerStats(
        time=round(time, 3),
        uptime_s=round(now.uptime_s, 3),
        num_queued=now.num_queued,
        num_running=now.num_running,
        num_completed=now.num_completed,
        num_failed=now.num_failed,
        num_cancelled=now.num_cancelled,
        num_restarts=now.num_restarts,
        batch_size=round(steps / ticks, 2) if ticks else 0.0,
        steps_per_s=round(steps / took_s, 2),
        busy=round(min(1.0, elapsed_s / took_s / max(len(now.replicas), 1)), 3),
    )


def sample_of(stats: ServerStats) -> Sample:
    """What a chart needs of it."""
    return Sample(*(getattr(stats, name) for name in Sample.__struct_fields__))


def _num(calls: Iterable[CallStatistics], kind: CallKind, what: str = "num_calls") -> int:
    return sum(getattr(call, what) for call in calls if call.kind == kind)
