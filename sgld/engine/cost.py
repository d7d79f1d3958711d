"""What a forward costs: t(key, rows, degree), learned from every tick."""

import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Protocol

from sgld.engine.curve import MIN_SAMPLES, PATIENCE, Curve
from sgld.messages import Variant

# Keys hold the length of a prompt, too, so a long-lived server meets ever new ones.
MAX_KEYS = 512
_ON = " on "
LearnedTime = tuple[str, int, Variant, float]
"""Cost key, rows, how it ran, seconds."""


class Cost(Protocol):
    """Predicts the seconds of a forward."""

    @property
    def version(self) -> int:
        """Goes up when predictions change."""
        ...

    def predict(self, key: str, rows: int, degree: int = 1) -> float | None:
        """Seconds of a forward of so many rows on so many ranks; None where nothing like it was run, or it is too large
        to be tried.
        """
        ...

    def estimate(self, key: str, rows: int) -> float | None:
        """The prediction for as many ranks as are fastest, or what can be said without one: by the size of the call."""
        ...

    def share(self, key: str, num_ranks: int) -> float:
        """What a forward of one row takes of so many ranks where these have enough to do, to its estimate."""
        ...


class CostModel:
    """A curve for each key, and for each degree that was tried."""

    def __init__(self) -> None:
        self._curves: OrderedDict[str, Curve] = OrderedDict()
        """The one that ran last is at the end."""
        self._degrees: dict[str, set[int]] = {}
        """Of which there are curves, by key."""
        self._guesses: dict[str, float | None] = {}
        self._version = 0

    @property
    def version(self) -> int:
        return self._version

    def observe(self, key: str, rows: int, elapsed_s: float, variant: Variant = "eager") -> None:
        """Learn from one forward."""
        curve = self._curves.get(key)
        if curve is None:
            base, degree = degree_of(key)
            # Each block of ranks runs it eagerly before it has a graph, and who believed that would never try it again.
            curve = self._curves[key] = Curve(1 if degree == 1 else PATIENCE)
            self._degrees.setdefault(base, set()).add(degree)
        self._curves.move_to_end(key)
        if len(self._curves) > MAX_KEYS:
            self._forget(self._curves.popitem(last=False)[0])
        if curve.observe(rows, elapsed_s, variant):
            self._version += 1
            self._guesses.clear()

    def predict(self, key: str, rows: int, degree: int = 1) -> float | None:
        """None for a key that never ran alone or in company, and beyond twice the rows that were tried.

        A degree that wasn't tried takes half of the time that half of it takes, so it is tried, once that was. What it
        gained holds for other numbers of rows, until they are known.
        """
        curve = self._curves.get(at_degree(key, degree))
        own_s = curve.at(rows) if curve is not None else None
        if own_s is not None or degree == 1:
            return own_s
        half_s = self.predict(key, rows, degree // 2)
        if half_s is None:
            return None
        if curve is not None and curve.known:
            tried, tried_s = min(curve.known, key=lambda point: abs(point[0] - rows))
            before_s = self.predict(key, tried, degree // 2)
            return half_s * tried_s / before_s if before_s else None
        before = self._curves.get(at_degree(key, degree // 2))
        return half_s / 2 if before is not None and before.known else None

    def estimate(self, key: str, rows: int) -> float | None:
        """An unknown key costs as much per position as the known one of the same component that is nearest in size."""
        predicted_s = min(self._tried(key, rows), default=None)
        if predicted_s is not None:
            return predicted_s[0]
        alone_s = min((elapsed_s for elapsed_s, _ in self._tried(key, 1)), default=None)
        if alone_s is None:
            if key not in self._guesses:
                self._guesses[key] = self._by_size(key)
            alone_s = self._guesses[key]
        return None if alone_s is None else alone_s * rows

    def share(self, key: str, num_ranks: int) -> float:
        """That of the degree that takes the least of the ranks: often one rank for each forward."""
        tried = list(self._tried(key, 1))
        if num_ranks == 1 or not tried or not min(tried)[0]:
            return 1.0
        least_s = min(degree * elapsed_s for elapsed_s, degree in tried)
        return min(least_s / num_ranks / min(tried)[0], 1.0)

    def _tried(self, key: str, rows: int) -> Iterator[tuple[float, int]]:
        """Seconds, and on how many ranks."""
        for degree in self._degrees.get(key, ()):
            if (elapsed_s := self._curves[at_degree(key, degree)].at(rows)) is not None:
                yield elapsed_s, degree

    def _forget(self, key: str) -> None:
        base, degree = degree_of(key)
        self._degrees[base].discard(degree)
        if not self._degrees[base]:
            del self._degrees[base]

    def recall(self, learned: Iterable[LearnedTime]) -> None:
        """Begin with what an earlier start learned; it is outvoted by the first runs that differ."""
        for key, rows, variant, elapsed_s in learned:
            for _ in range(MIN_SAMPLES if degree_of(key)[1] == 1 else PATIENCE):
                self.observe(key, rows, elapsed_s, variant)

    def learned(self) -> list[LearnedTime]:
        """All that is known, for the next start."""
        return [(key, *time) for key, curve in self._curves.items() for time in curve.times()]

    def current(self) -> list[LearnedTime]:
        """What predictions are made of: each number of rows once, as it runs now or is about to."""
        return [
            (key, rows, variant, elapsed_s)
            for key, curve in self._curves.items()
            for rows, elapsed_s in curve.known
            if (variant := curve.variant_of(rows)) is not None
        ]

    def _by_size(self, key: str) -> float | None:
        method, own = key.partition("(")[0], num_positions(key)
        others = (
            (num_positions(other), alone_s)
            for other, curve in self._curves.items()
            if other.partition("(")[0] == method and degree_of(other)[1] == 1 and (alone_s := curve.at(1)) is not None
        )
        nearest = min(others, key=lambda other: abs(math.log(other[0] / own)), default=None)
        return nearest[1] * own / nearest[0] if nearest is not None else None


class FlatCost:
    """Every forward takes a second: merging always pays."""

    version = 0

    def predict(self, key: str, rows: int, degree: int = 1) -> float | None:
        return 1.0

    def estimate(self, key: str, rows: int) -> float | None:
        return 1.0

    def share(self, key: str, num_ranks: int) -> float:
        return 1.0


def at_degree(key: str, degree: int) -> str:
    """The cost key of calls that so many ranks share, where they choose that for each forward."""
    return key if degree == 1 else f"{key}{_ON}{degree} ranks"


def degree_of(key: str) -> tuple[str, int]:
    """The cost key and the degree that `at_degree` made a key of."""
    base, on, rest = key.rpartition(_ON)
    return (base, int(rest.partition(" ")[0])) if on else (key, 1)


def num_positions(key: str) -> int:
    """How much a call has to work through: the positions of its sequences and pictures, at least 1.

    A cost key ends in the shapes of the call's tensors without their batch axis: (S, D) has S positions, (C, H, W) and
    (C, F, H, W) have one for each pixel. Single numbers count only where there is nothing else, as token ids.
    """
    shapes = [
        [int(n) for n in shape.split("x")]
        for shape in re.findall(r"\d+(?:x\d+)*", key.partition("(")[2].partition(")")[0])
    ]
    counts = [math.prod(shape[1:]) if len(shape) > 2 else shape[0] for shape in shapes if len(shape) > 1]
    return max(sum(counts or (shape[0] for shape in shapes)), 1)
