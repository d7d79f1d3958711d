"""Time that a bench has, and what still fits into it: a run that is ended early has measured what matters most."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Budget:
    """So many seconds from now on; None: as many as it takes."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = math.inf if seconds is None else clock() + seconds

    @property
    def left_s(self) -> float:
        """What is left; infinite where there is no limit."""
        return max(self._until - self._clock(), 0.0)

    def has(self, seconds: float) -> bool:
        """Whether something that takes so long still fits."""
        return self.left_s > seconds

    def as_many(self, of: Iterable[T]) -> Iterator[T]:
        """The first in any case, then those that fit if each takes as long as the longest before."""
        longest = 0.0
        for index, one in enumerate(of):
            if index and not self.has(longest):
                return
            start = self._clock()
            yield one
            longest = max(longest, self._clock() - start)

    def share(self, part: float, of: float) -> float | None:
        """The seconds of a part of what is still to come; None: as many as it takes."""
        return None if math.isinf(self._until) else self.left_s * part / of
