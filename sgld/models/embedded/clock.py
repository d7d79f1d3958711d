"""Training by wall clock: how far a phase is, its learning rate, and a line of progress now and then."""

import math
import time
from collections.abc import Callable


class Clock:
    """A phase that lasts `total_s`, of which `done_s` passed in an earlier run, and this run goes on to `until_s`."""

    def __init__(self, total_s: float, *, done_s: float = 0.0, until_s: float | None = None, warmup_steps: int = 200):
        self.total_s = total_s
        self.until_s = total_s if until_s is None else min(until_s, total_s)
        self._warmup_steps = warmup_steps
        self._start = time.monotonic() - done_s
        self._num_steps = 0
        self._next_line_s = done_s

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    @property
    def is_over(self) -> bool:
        return self.elapsed_s >= self.until_s

    def rate(self) -> float:
        """The learning rate as a fraction of its peak: linear warm-up in steps, cosine to 0 at the end of the time."""
        warm = min(1.0, (self._num_steps + 1) / self._warmup_steps)
        progress = min(1.0, self.elapsed_s / self.total_s)
        return warm * 0.5 * (1 + math.cos(math.pi * progress))

    def step(self, name: str, value: Callable[[], float]) -> None:
        """Counts a step; every 15 s prints the value, which may wait for the device."""
        self._num_steps += 1
        if self.elapsed_s >= self._next_line_s:
            self._next_line_s = self.elapsed_s + 15
            print(f"{self.elapsed_s:6.0f} s  step {self._num_steps:6d}  {name} {value():.5f}", flush=True)
