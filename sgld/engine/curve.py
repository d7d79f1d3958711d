"""Seconds over rows for the calls of one key, which run in several ways: a pure object."""

import bisect
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from sgld.messages import Variant

# One run at another number of rows says little: it may be slow because it is the first (allocation, autotuning).
MIN_SAMPLES = 2
MAX_SAMPLES = 15
# A batch is never larger than so many times what was tried: its time and its memory can't be known.
GROWTH = 2
# Estimates that move by less aren't news: everything that is derived from them stays as it is.
NEWS = 0.02
# A number of rows may become as fast as others have become. After so many runs in which it didn't, it won't: a graph
# is captured with the third use.
PATIENCE = 5
# The fastest last.
_ORDER: tuple[Variant, ...] = ("eager", "compiled", "graph", "compiled graph")
_SPEED = {variant: speed for speed, variant in enumerate(_ORDER)}


@dataclass(eq=False)
class _Row:
    """What is known of one number of rows."""

    samples: dict[Variant, deque[float]] = field(default_factory=dict)
    variant: Variant | None = None
    """How it runs; None while it ran too seldom."""
    num_slow: int = 0
    """Runs in a slower way than the fastest that is known, since that is known."""

    def seconds(self, variant: Variant) -> float | None:
        """The lower median: of two runs the faster one, as the first may have been slow for reasons of its own."""
        samples = self.samples.get(variant, ())
        return sorted(samples)[(len(samples) - 1) // 2] if samples else None


class Curve:
    """The median of the last runs at each number of rows; between and beyond these, straight lines.

    Times of variants are kept apart. A number of rows is priced as it will run: by its own times if these are of the
    fastest variant that the key has come to, or stay what they are; else by its own in proportion to what others
    gained, and as no dearer than more rows. So a graph of one row doesn't make two rows look too dear to be tried,
    which would never be captured then, and first runs that were slow by chance don't count for long.

    :param num_first: so many runs tell the first time.
    """

    def __init__(self, num_first: int = 1) -> None:
        self._num_first = num_first
        self.known: list[tuple[int, float]] = []
        """By rows."""
        self._rows: dict[int, _Row] = {}
        self._max_rows = 0
        self._best: Variant | None = None
        """The fastest in which it runs with any number of rows."""
        self._cache: dict[int, float | None] = {}

    def observe(self, rows: int, elapsed_s: float, variant: Variant) -> bool:
        """Learn from one run; whether that was news."""
        row = self._rows.setdefault(rows, _Row())
        samples = row.samples.setdefault(variant, deque(maxlen=MAX_SAMPLES))
        samples.append(elapsed_s)
        is_first = self._best is None
        num = sum(map(len, row.samples.values())) if is_first else len(samples)
        if num < (self._num_first if is_first else MIN_SAMPLES):
            return False
        # Of several ranks the last run may be that of a block which has no graph yet.
        self._settle(row, max(row.samples, key=_SPEED.__getitem__) if is_first else variant)
        self._max_rows = max(self._max_rows, rows)
        known = self._points()
        if len(known) == len(self.known) and all(map(_is_no_news, self.known, known)):
            return False
        self.known = known
        self._cache.clear()
        return True

    def at(self, rows: int) -> float | None:
        """Seconds of so many rows; None beyond twice of what was tried."""
        if rows not in self._cache:
            self._cache[rows] = self._at(rows)
        return self._cache[rows]

    def times(self) -> Iterator[tuple[int, Variant, float]]:
        """All that is known: rows, how they ran, seconds. What ran too seldom to be believed isn't."""
        for rows, row in sorted(self._rows.items()):
            if row.variant is None:
                continue
            for variant, samples in row.samples.items():
                elapsed_s = row.seconds(variant)
                if elapsed_s is not None and (variant == row.variant or len(samples) >= MIN_SAMPLES):
                    yield rows, variant, elapsed_s

    def variant_of(self, rows: int) -> Variant | None:
        """How so many rows run."""
        return self._rows[rows].variant if rows in self._rows else None

    def _settle(self, row: _Row, variant: Variant) -> None:
        """Decide how a number of rows runs, that just ran in this way.

        1. As fast as any, or faster: others may follow.
        2. More slowly: it may have to be captured, or again. Not for ever.
        """
        if self._best is None or _SPEED[variant] >= _SPEED[self._best]:
            if variant != self._best:
                self._best = variant
                for other in self._rows.values():
                    other.num_slow = 0
            row.variant, row.num_slow = variant, 0
            return
        row.num_slow += 1
        if row.variant is None or row.num_slow >= PATIENCE or _SPEED[variant] > _SPEED[row.variant]:
            row.variant = variant
            variants = [other.variant for other in self._rows.values() if other.variant is not None]
            best: Variant = max(variants, key=_SPEED.__getitem__)
            self._best = best

    def _points(self) -> list[tuple[int, float]]:
        points, most_s = list[tuple[int, float]](), math.inf
        for rows, row in sorted(self._rows.items(), reverse=True):
            if row.variant is None:
                continue
            own_s = row.seconds(row.variant)
            is_final = row.variant == self._best or row.num_slow >= PATIENCE
            gain = 1.0 if is_final else self._gain(rows, row.variant)
            if own_s is not None and gain is not None:
                points.append((rows, own_s if is_final else min(own_s * gain, most_s)))
                most_s = min(most_s, points[-1][1])
        return points[::-1]

    def _gain(self, rows: int, variant: Variant) -> float | None:
        """Seconds in the fastest variant by those in this one, at the nearest number of rows where both are known."""
        assert self._best is not None
        both = (
            (abs(math.log(other / rows)), best_s / variant_s)
            for other, row in self._rows.items()
            if (best_s := row.seconds(self._best)) and (variant_s := row.seconds(variant))
        )
        return min(both, default=(0.0, None))[1]

    def _at(self, rows: int) -> float | None:
        if not self.known or rows > GROWTH * self._max_rows:
            return None
        if len(self.known) == 1:
            # More rows take at least as long: so they are tried. Fewer take no longer.
            return self.known[0][1]
        right = min(max(bisect.bisect_left(self.known, (rows,)), 1), len(self.known) - 1)
        (low, low_s), (high, high_s) = self.known[right - 1 : right + 1]
        slope = (high_s - low_s) / (high - low)
        # What is known comes out as it is, however far apart its neighbours are.
        if rows >= high:
            return high_s + max(slope, 0.0) * (rows - high)
        if rows < low:
            return min(low_s, max(low_s - slope * (low - rows), low_s * rows / low))
        return low_s + slope * (rows - low)


def _is_no_news(old: tuple[int, float], new: tuple[int, float]) -> bool:
    return old[0] == new[0] and abs(new[1] - old[1]) <= NEWS * old[1]
