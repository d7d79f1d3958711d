"""What a rank that loads says it does, as lines of a log: each stage once, and again while it takes long."""

import time
from collections.abc import Callable

AGAIN_S = 10.0


class Stages:
    """The stages of one start, which begins now."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._stage = ""
        self._told_at = self._began

    @property
    def elapsed_s(self) -> float:
        """Since the start."""
        return self._clock() - self._began

    def heard(self, stage: str) -> str | None:
        """The rank says what it does; returns what is to be logged, if anything."""
        now = self._clock()
        if stage == self._stage and now < self._told_at + AGAIN_S:
            return None
        is_new, self._stage, self._told_at = stage != self._stage, stage, now
        return f"{stage if is_new else f'still {stage}'} ({now - self._began:.0f} s)"
