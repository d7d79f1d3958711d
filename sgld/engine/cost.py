"""What a forward costs: t(key, rows), learned from every tick."""

import bisect
import math
import re
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Protocol

# One run at another number of rows says little: it may be slow because it is the first (allocation, autotuning).
MIN_SAMPLES = 2
MAX_SAMPLES = 15
# Keys hold the length of a prompt, too, so a long-lived server meets ever new ones.
MAX_KEYS = 512
# A batch is never larger than so many times what was tried: its time and its memory can't be known.
GROWTH = 2
# Estimates that move by less aren't news: everything that is derived from them stays as it is.
NEWS = 0.02

LearnedTime = tuple[str, int, float]
"""Cost key, rows, seconds."""


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
    """The median of the last runs at each number of rows; between and beyond these, straight lines."""

    def __init__(self) -> None:
        self._curves: OrderedDict[str, _Curve] = OrderedDict()
        """The one that ran last is at the end."""
        self._guesses: dict[str, float | None] = {}
        self._version = 0

    @property
    def version(self) -> int:
        return self._version

    def observe(self, key: str, rows: int, elapsed_s: float) -> None:
        """Learn from one forward."""
        curve = self._curves.setdefault(key, _Curve())
        self._curves.move_to_end(key)
        if len(self._curves) > MAX_KEYS:
            self._curves.popitem(last=False)
        if curve.observe(rows, elapsed_s):
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
        for key, rows, elapsed_s in learned:
            for _ in range(MIN_SAMPLES):
                self.observe(key, rows, elapsed_s)

    def learned(self) -> list[LearnedTime]:
        """All that is known, for the next start."""
        return [(key, rows, s) for key, curve in self._curves.items() for rows, s in curve.known]

    def _by_size(self, key: str) -> float | None:
        method, own = key.partition("(")[0], num_positions(key)
        others = (
            (num_positions(other), alone_s)
            for other, curve in self._curves.items()
            if other.partition("(")[0] == method and (alone_s := curve.at(1)) is not None
        )
        nearest = min(others, key=lambda other: abs(math.log(other[0] / own)), default=None)
        return nearest[1] * own / nearest[0] if nearest is not None else None


class _Curve:
    """Seconds over rows for the calls of one key."""

    def __init__(self) -> None:
        self.known: list[tuple[int, float]] = []
        """By rows."""
        self._samples: dict[int, deque[float]] = {}
        self._cache: dict[int, float | None] = {}

    def observe(self, rows: int, elapsed_s: float) -> bool:
        """Learn from one run; whether that was news."""
        samples = self._samples.setdefault(rows, deque(maxlen=MAX_SAMPLES))
        samples.append(elapsed_s)
        place = bisect.bisect_left(self.known, (rows,))
        is_known = place < len(self.known) and self.known[place][0] == rows
        if self.known and not is_known and len(samples) < MIN_SAMPLES:
            return False
        # The lower median: of two runs the faster one, as the first may have been slow for reasons of its own.
        median = sorted(samples)[(len(samples) - 1) // 2]
        if is_known and abs(median - self.known[place][1]) <= NEWS * self.known[place][1]:
            return False
        self.known[place : place + is_known] = [(rows, median)]
        self._cache.clear()
        return True

    def at(self, rows: int) -> float | None:
        if rows not in self._cache:
            self._cache[rows] = self._at(rows)
        return self._cache[rows]

    def _at(self, rows: int) -> float | None:
        if not self.known or rows > GROWTH * self.known[-1][0]:
            return None
        if len(self.known) == 1:
            # More rows take at least as long: so they are tried. Fewer take no longer.
            return self.known[0][1]
        right = min(max(bisect.bisect_left(self.known, (rows,)), 1), len(self.known) - 1)
        (low, low_s), (high, high_s) = self.known[right - 1 : right + 1]
        slope = (high_s - low_s) / (high - low)
        if rows > high:
            return high_s + max(slope, 0.0) * (rows - high)
        if rows < low:
            return min(low_s, max(low_s - slope * (low - rows), low_s * rows / low))
        return low_s + slope * (rows - low)


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
