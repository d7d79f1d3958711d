"""What a request asks of the scheduler, and what requests like it were seen to take."""

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from sgld.engine.cost import Cost
from sgld.messages import CallInfo, CallKind
from sgld.sampling_params import SamplingParams

MAX_PROFILES = 256

CallClass = tuple[CallKind, str, int]
"""Calls that take the same time: kind, cost key, rows."""


@dataclass(frozen=True)
class Demand:
    """What is known of a request when it arrives."""

    priority: int = 0
    deadline_s: float | None = None
    """Seconds from its arrival."""
    like: str = ""
    """Requests with an equal one make the same calls."""
    work: float | None = None
    """Grows with what it takes: pixels times steps, where the client chose both."""


def demand_of(params: SamplingParams) -> Demand:
    """What the params of one output say."""
    size = (params.width, params.height, params.num_frames or 1, params.num_inference_steps)
    guidance = (params.guidance_scale, params.guidance_scale_2, params.true_cfg_scale, params.negative_prompt is None)
    has_all = all(isinstance(part, int) for part in size)
    options = [*sorted(map(str, params.diffusers_kwargs)), *([repr(params.cache)] if params.cache else [])]
    options += ["exact"] if params.exact else []
    if (factors := (params.frame_factor, params.size_factor)) != (1, 1):
        options.append(f"{factors} {params.frame_interpolation_model_path} {params.upscaling_model_path}")
    return Demand(
        priority=params.priority,
        deadline_s=params.deadline_s,
        like=repr((*size, *guidance, len(params.image_path), options)),
        work=float(math.prod(part or 0 for part in size)) if has_all else None,
    )


class Profile(msgspec.Struct, frozen=True, array_like=True):
    """The calls that one request made from start to end."""

    like: str
    work: float | None
    calls: tuple[tuple[CallClass, int], ...]


class Profiles:
    """The calls of requests that were completed, by what they are like.

    They hold no seconds: those come from the cost model, which goes on learning.
    """

    def __init__(self, cost: Cost) -> None:
        self.version = 0
        """Goes up when a request makes calls that none like it made before."""
        self._cost = cost
        self._profiles: OrderedDict[str, Profile] = OrderedDict()
        self._seconds: dict[tuple[str, bool], float | None] = {}
        self._version = cost.version

    def recall(self, learned: Iterable[Profile]) -> None:
        """Begin with what an earlier start learned."""
        self._profiles.update((profile.like, profile) for profile in learned)
        self._seconds.clear()

    def learn(self, demand: Demand, made: Counter[CallClass]) -> None:
        """A request was completed with these calls."""
        profile = Profile(demand.like, demand.work, tuple(made.items()))
        if self._profiles.get(demand.like) != profile:
            self._profiles[demand.like] = profile
            self._seconds.clear()
            self.version += 1
        self._profiles.move_to_end(demand.like)
        if len(self._profiles) > MAX_PROFILES:
            self._profiles.popitem(last=False)

    def known_s(self, demand: Demand) -> float | None:
        """Seconds of all calls of such a request, alone; None if there was none exactly like it."""
        return self._seconds_of(demand.like, is_tail=False)

    def step_of(self, demand: Demand) -> tuple[str, int, int] | None:
        """Of the denoising calls of such a request the kind that it makes most: cost key, rows, and how many."""
        profile = self._profiles.get(demand.like)
        calls = (
            [(number, key, rows) for (kind, key, rows), number in profile.calls if kind == "denoise"] if profile else []
        )
        number, key, rows = max(calls, default=(0, "", 0))
        return (key, rows, number) if number else None

    def total_s(self, demand: Demand) -> float | None:
        """The same, or what can be said by the requests that were most like it."""
        return self._scaled(demand, is_tail=False)

    def tail_s(self, demand: Demand) -> float:
        """Seconds of decoding."""
        return self._scaled(demand, is_tail=True) or 0.0

    def learned(self) -> list[Profile]:
        """All that is known, for the next start."""
        return list(self._profiles.values())

    def _scaled(self, demand: Demand, *, is_tail: bool) -> float | None:
        """Of what isn't known: the time of the request that is nearest by its work, in proportion."""
        if demand.like in self._profiles or demand.work is None:
            return self._seconds_of(demand.like, is_tail=is_tail)
        own = demand.work
        others = [(profile.work, profile.like) for profile in self._profiles.values() if profile.work]
        nearest = min(others, key=lambda other: abs(math.log(other[0] / own)), default=None)
        seconds = self._seconds_of(nearest[1], is_tail=is_tail) if nearest is not None else None
        return seconds * own / nearest[0] if nearest is not None and seconds is not None else None

    def _seconds_of(self, like: str, *, is_tail: bool) -> float | None:
        if self._version != self._cost.version:
            self._version = self._cost.version
            self._seconds.clear()
        key = like, is_tail
        if key not in self._seconds:
            profile = self._profiles.get(like)
            calls = [(c, n) for c, n in profile.calls if not is_tail or c[0] == "decode"] if profile else None
            self._seconds[key] = seconds_of(self._cost, calls) if calls is not None else None
        return self._seconds[key]


def call_class(call: CallInfo) -> CallClass:
    """What the time of a call depends on."""
    return call.kind, call.cost_key, call.rows


def seconds_of(cost: Cost, calls: Iterable[tuple[CallClass, int]]) -> float | None:
    """Seconds of calls one after the other; None if nothing is known of one of them."""
    total_s = 0.0
    for (_, key, rows), number in calls:
        call_s = cost.estimate(key, rows)
        if call_s is None:
            return None
        total_s += number * call_s
    return total_s
