"""How far predictions for clients are from what came: counted when requests are completed."""

import bisect
from collections import defaultdict
from typing import Literal

import msgspec

BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5)
Told = Literal["queued", "started", "halfway"]


class EtaStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """The errors of predictions that were told at one stage of requests.

    An error is the difference between the seconds that were predicted and those that it took from there, as part of
    the latter.
    """

    told: Told
    num: int
    error_sum: float
    buckets: tuple[int, ...]
    """How many were at most each of BOUNDS, but more than the one before; the last: more than all."""


class EtaErrors:
    """Keeps what requests on their way were told, and compares."""

    def __init__(self) -> None:
        self._told: defaultdict[str, dict[Told, tuple[float, float]]] = defaultdict(dict)
        """When it was, and what."""
        self._by_stage: dict[Told, EtaStatistics] = {}

    @property
    def statistics(self) -> tuple[EtaStatistics, ...]:
        """By stage."""
        return tuple(self._by_stage.values())

    def count_anew(self) -> None:
        """What was told so far says nothing of what comes."""
        self._by_stage.clear()

    def told(self, request_id: str, stage: Told, eta_s: float | None, now: float) -> None:
        """A request is predicted to be completed after so many seconds; the first time at a stage counts."""
        if eta_s is not None:
            self._told[request_id].setdefault(stage, (now, eta_s))

    def ended(self, request_id: str, now: float, *, is_completed: bool) -> None:
        """A request is over; those that failed or were cancelled count for nothing."""
        for stage, (at, eta_s) in self._told.pop(request_id, {}).items():
            if is_completed and now > at:
                self._count(stage, abs(eta_s - (now - at)) / (now - at))

    def _count(self, stage: Told, error: float) -> None:
        nothing = EtaStatistics(told=stage, num=0, error_sum=0.0, buckets=(0,) * (len(BOUNDS) + 1))
        before = self._by_stage.get(stage, nothing)
        place = bisect.bisect_left(BOUNDS, error)
        self._by_stage[stage] = EtaStatistics(
            told=stage,
            num=before.num + 1,
            error_sum=before.error_sum + error,
            buckets=tuple(num + (index == place) for index, num in enumerate(before.buckets)),
        )
