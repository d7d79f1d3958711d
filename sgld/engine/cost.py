"""What a forward costs: t(key, rows), learned from every tick."""

import math
import re
from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

from sgld.engine.curve import MIN_SAMPLES, Curve
from sgld.messages import Variant

# Keys hold the length of a prompt, too, so a long-lived server meets ever new ones.
MAX_KEYS = 512
LearnedTime = tuple[str, int, Variant, float]
"""Cost key, rows, how it ran, seconds."""


class Cost(Protocol):
    """Predicts the seconds of a forward."""

    @property
    def version(self) -> int:
        """Goes up when predictions change."""
        ...

    def predict(self, key: str, rows: int) -> float | None:
        """Seconds of a forward of so many rows; None where nothing like it was run, or it is too large to be tried."""
        ...

    def estimate(self, key: str, rows: int) -> float | None:
        """The prediction, or what can be said without one: by the size of the call."""
        ...


class CostModel:
    """A curve for each key."""

    def __init__(self) -> None:
        self._curves: OrderedDict[str, Curve] = OrderedDict()
        """The one that ran last is at the end."""
        self._guesses: dict[str, float | None] = {}
        self._version = 0

    @property
    def version(self) -> int:
        return self._version

    def observe(self, key: str, rows: int, elapsed_s: float, variant: Variant = "eager") -> None:
        """Learn from one forward."""
        curve = self._curves.setdefault(key, Curve())
        self._curves.move_to_end(key)
        if len(self._curves) > MAX_KEYS:
            self._curves.popitem(last=False)
        if curve.observe(rows, elapsed_s, variant):
            self._version += 1
            self._guesses.clear()

    def predict(self, key: str, rows: int) -> float | None:
        """None for a key that never ran alone or in company, and beyond twice the rows that were tried."""
        curve = self._curves.get(key)
        return curve.at(rows) if curve is not None else None

    def estimate(self, key: str, rows: int) -> float | None:
        """An unknown key costs as much per position as the known one of the same component that is nearest in size."""
        predicted_s = self.predict(key, rows)
        if predicted_s is not None:
            return predicted_s
        alone_s = self.predict(key, 1)
        if alone_s is None:
            if key not in self._guesses:
                self._guesses[key] = self._by_size(key)
            alone_s = self._guesses[key]
        return None if alone_s is None else alone_s * rows

    def recall(self, learned: Iterable[LearnedTime]) -> None:
        """Begin with what an earlier start learned; it is outvoted by the first runs that differ."""
        for key, rows, variant, elapsed_s in learned:
            for _ in range(MIN_SAMPLES):
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
            if other.partition("(")[0] == method and (alone_s := curve.at(1)) is not None
        )
        nearest = min(others, key=lambda other: abs(math.log(other[0] / own)), default=None)
        return nearest[1] * own / nearest[0] if nearest is not None else None


class FlatCost:
    """Every forward takes a second: merging always pays."""

    version = 0

    def predict(self, key: str, rows: int) -> float | None:
        return 1.0

    def estimate(self, key: str, rows: int) -> float | None:
        return 1.0


def num_positions(key: str) -> int:
    """How much a call has to work through: the positions of its sequences and pictures, at least 1.

    A cost key ends in the shapes of the call's tensors without their batch axis: (S, D) has S positions, (C, H, W) and
    (C, F, H, W) have one for each pixel. Single numbers count only where there is nothing else, as token ids.
    """
    shapes = [[int(n) for n in shape.split("x")] for shape in re.findall(r"\d+(?:x\d+)*", key.partition("(")[2])]
    counts = [math.prod(shape[1:]) if len(shape) > 2 else shape[0] for shape in shapes if len(shape) > 1]
    return max(sum(counts or (shape[0] for shape in shapes)), 1)
