"""What a forward costs: t(key, rows), learned from every tick."""

from collections import deque
from typing import Protocol

# Enough to tell a first, slow run (allocation, autotuning) from the rule.
MIN_SAMPLES = 2
MAX_SAMPLES = 8


class Cost(Protocol):
    """Predicts the seconds of a forward."""

    def predict(self, key: str, rows: int) -> float | None:
        """Seconds of a forward of so many rows; None while nothing is known of such calls."""
        ...


class CostModel:
    """The fastest of the last few runs at each number of rows: noise only ever adds time."""

    def __init__(self) -> None:
        self._samples: dict[str, dict[int, deque[float]]] = {}

    def observe(self, key: str, rows: int, elapsed_s: float) -> None:
        """Learn from one forward."""
        by_rows = self._samples.setdefault(key, {})
        by_rows.setdefault(rows, deque(maxlen=MAX_SAMPLES)).append(elapsed_s)

    def predict(self, key: str, rows: int) -> float | None:
        """Measured where it was; else what the next smaller number of rows took.

        That is the least it can take, so sizes that weren't tried are tried.
        """
        known = {n: min(s) for n, s in self._samples.get(key, {}).items() if len(s) >= MIN_SAMPLES or n == 1}
        smaller = [n for n in known if n <= rows]
        if smaller:
            return known[max(smaller)]
        return min(known.values(), default=None)

    def learned(self) -> list[tuple[str, int, float]]:
        """All that is known: cost key, rows, seconds."""
        return [(key, n, min(s)) for key, by_rows in self._samples.items() for n, s in by_rows.items()]


class FlatCost:
    """Every forward takes a second: merging always pays."""

    def predict(self, key: str, rows: int) -> float | None:
        return 1.0
