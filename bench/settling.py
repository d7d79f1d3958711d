"""Requests until a server has compiled and captured all that it will: a part of the comparison with plain diffusers."""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import anyio
from lines import say
from rows import Row

# Where the prompts and seeds of these requests begin; those that are measured have others.
_SETTLING = 500
_FEW_STEPS = {"num_inference_steps": 6}
_LOOK_S = 0.2
# Rounds that took as long as one another, within so much.
_NUM_STEADY, _STEADY = 3, 1.1


@dataclass(frozen=True)
class Known:
    """What is said of components, by name, and of their code: whether some is on its way, how often that changed."""

    decisions: dict[str, str]
    is_compiling: bool = False
    num_changes: int = 0


def known_of(decisions: Mapping[str, str], replicas: Sequence[Mapping[str, Any]]) -> Known:
    """Of what the engine says of its model, and the statistics of its replicas."""
    is_compiling = any(replica["is_compiling"] for replica in replicas)
    return Known(dict(decisions), is_compiling, sum(replica["num_code_changes"] for replica in replicas))


def unsettled(before: Known, after: Known, *, is_settled: bool) -> dict[str, str]:
    """A note for what was measured meanwhile, where it isn't what is measured once all is compiled."""
    if has_come(before, after):
        return {"unsettled": "code was being compiled"}
    return {} if is_settled else {"unsettled": "times weren't steady before"}


class Settling:
    """Requests that aren't measured, while things are compiled and captured in the background.

    :param limit_s: after so many seconds it ends in any case.
    :param one: runs a request; :return: what it took, in any unit.
    :param known: what is said of components and their code.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        call: Any,
        limit_s: float,
        one: Callable[[dict[str, Any]], Awaitable[float]],
        known: Callable[[], Awaitable[Known]],
    ) -> None:
        self._until = time.perf_counter() + limit_s
        self._rows, self._call, self._one, self._known = rows, call, one, known
        self._indices = count(_SETTLING)

    async def singles(self) -> bool:
        """Until the last rounds took as long as one another, and all is compiled; whether that was so in time."""
        rounds: list[list[float]] = []
        while (before := await self._idled()) is not None:
            rounds.append([await self._short(row) for row in self._rows if row.kind != "staggered"])
            say("settling", {"took": [round(value, 3) for value in rounds[-1]]})
            if is_steady(rounds) and is_done(before, await self._known()):
                return True
        return False

    async def staggered(self, together: Callable[[int], Awaitable[Any]]) -> bool:
        """Until all is compiled that staggered requests call for; whether that was so in time.

        :param together: runs these, the first of which has this index.
        """
        for turn in count(2):
            if (before := await self._idled()) is None:
                return False
            start = time.perf_counter()
            await together(_SETTLING * turn)
            say("settling", {"staggered_s": round(time.perf_counter() - start, 3)})
            if is_done(before, await self._known()):
                return True
        raise AssertionError("turns are endless")

    async def _idled(self) -> Known | None:
        """What is known once no code is on its way; None: time is up.

        Nothing is sent meanwhile, as a rank without requests reads code at once.
        """
        start = time.perf_counter()
        while time.perf_counter() < self._until:
            known = await self._known()
            if not known.is_compiling:
                if (idle_s := time.perf_counter() - start) > _LOOK_S:
                    say("settling", {"idle_s": round(idle_s, 3)})
                return known
            await anyio.sleep(_LOOK_S)
        return None

    async def _short(self, row: Row) -> float:
        return await self._one(row.request(next(self._indices), self._call) | _FEW_STEPS)


def is_done(before: Known, after: Known) -> bool:
    """Whether all that is to be compiled is, and was meanwhile."""
    return not has_come(before, after) and is_compiled(after.decisions)


def has_come(before: Known, after: Known) -> bool:
    """Whether code was on its way meanwhile, or is."""
    return before.is_compiling or after.is_compiling or before.num_changes != after.num_changes


def is_steady(rounds: Sequence[Sequence[float]]) -> bool:
    """Whether the last three rounds differ by little."""
    last = rounds[-_NUM_STEADY:]
    return len(last) == _NUM_STEADY and all(max(of) <= _STEADY * min(of) for of in zip(*last, strict=True))


def is_compiled(decisions: dict[str, str]) -> bool:
    """Whether all that is to be compiled is, or can't be."""
    said = [note.split("; ") for note in decisions.values() if "compiled by a process of its own" in note]
    return all("compiled" in phrases or any("without compilation" in p for p in phrases) for phrases in said)
