"""What ranks say to one another of graphs: rank 0 decides, and what one of them refuses none of them replays."""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from sgld.worker.graph_policy import Decision
from sgld.worker.recorder import CaptureFailed, Full, Leaking, Slow, Unfit

Rest = tuple[Any, ...]
"""The end of a key; its beginning is the component, which each rank has for itself."""


class Shared(NamedTuple):
    """What is fixed for graphs of what ranks share. `part`: what of it each of them runs; `ranks`: which they are."""

    fixed: Hashable
    part: Hashable
    ranks: Hashable = None


@dataclass(frozen=True)
class GraphOrder:
    """How ranks run a forward. `rest`: of its key; `gone`: keys of graphs that rank 0 has no more, by names."""

    decision: Decision
    rest: Rest
    gone: tuple[Rest, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """Why a graph isn't replayed.

    `said`: to people; empty: it doesn't pay. `is_passing`: memory was short. `may_upload`: a capture failed, which it
    does where tensors of the host are taken to the device. `is_leaking`: the model keeps what other graphs write to.
    """

    said: str = ""
    is_passing: bool = False
    may_upload: bool = False
    is_leaking: bool = False


@dataclass(frozen=True)
class Obeyed:
    """What came of an order on ranks of which rank 0 isn't one.

    `refusal`: what any of them has against the graph; None: nothing. `size_bytes`: what it takes, if it was captured.
    """

    refusal: Refusal | None = None
    size_bytes: int = 0


Agreement = Callable[[Refusal | None], Refusal | None]
"""From what this rank has against a graph to what any of them has; all are asked at the same places."""


@dataclass(frozen=True)
class Ordered:
    """An order as a rank gets it. `is_own`: it gave that itself."""

    order: GraphOrder
    agree: Agreement
    is_own: bool


def strongest(said: Iterable[Refusal | None]) -> Refusal | None:
    """What all ranks act on of what each of them has against a graph: on a leak first, as it concerns other graphs."""
    refusals = [refusal for refusal in said if refusal is not None]
    return min(refusals, key=lambda refusal: not refusal.is_leaking, default=None)


def refusal_of(problem: Unfit) -> Refusal:
    """What a problem means for those to come."""
    said = "" if isinstance(problem, Slow) else str(problem)
    return Refusal(
        said,
        is_passing=isinstance(problem, Full),
        may_upload=isinstance(problem, CaptureFailed),
        is_leaking=isinstance(problem, Leaking),
    )
