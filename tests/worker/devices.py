"""A GPU that isn't there: its stream, its events, and the clock of its host."""

import time
from dataclasses import dataclass

from sgld.worker.clock import DeviceClock


class FakeEvent:
    """Reached when the device has done all that it was given before."""

    def __init__(self, device: "FakeDevice") -> None:
        self._device = device
        self._at_s = 0.0

    def record(self) -> None:
        self._at_s = self._device.free_at_s = max(self._device.free_at_s, self._device.now_s)

    def query(self) -> bool:
        return self._at_s <= self._device.now_s + 1e-9

    def synchronize(self) -> None:
        self._device.now_s = max(self._device.now_s, self._at_s)

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert self.query(), "a GPU raises where an event isn't reached"
        assert end.query(), "a GPU raises where an event isn't reached"
        return 1e3 * (end._at_s - self._at_s)


@dataclass
class FakeDevice:
    """Work lies in a queue, one piece after the other."""

    now_s: float = 100.0
    free_at_s: float = 0.0

    def work(self, seconds: float, launch_s: float = 0.001) -> None:
        """Give it work."""
        self.now_s += launch_s
        self.free_at_s = max(self.free_at_s, self.now_s) + seconds

    def settle(self) -> None:
        self.now_s = max(self.now_s, self.free_at_s)

    def now_ns(self) -> int:
        return round(1e9 * self.now_s)

    def clock(self) -> DeviceClock:
        """Its clock."""
        return DeviceClock(lambda: FakeEvent(self), self.settle, self.now_ns)


@dataclass
class StreamingDevice(FakeDevice):
    """Computes each of a forward's kernels as soon as it has it; only so many wait in its queue, else the host does."""

    num_kernels: int = 100
    num_waiting: int = 40
    first_s: float = 0.0
    """The host takes so long to come to the first one."""

    def work(self, seconds: float, launch_s: float = 0.001) -> None:
        done_s: list[float] = []
        self.now_s += self.first_s
        for index in range(self.num_kernels):
            if index >= self.num_waiting:
                self.now_s = max(self.now_s, done_s[index - self.num_waiting])
            super().work(seconds / self.num_kernels, launch_s / self.num_kernels)
            done_s.append(self.free_at_s)


class LateEvent(FakeEvent):
    """Reached some milliseconds after it was recorded, on the clock of the host."""

    def __init__(self, lateness_s: float = 0.003) -> None:
        self._lateness_s = lateness_s
        super().__init__(FakeDevice())

    def record(self) -> None:
        self._at_s = time.monotonic() + self._lateness_s

    def query(self) -> bool:
        return self._at_s <= time.monotonic()

    def synchronize(self) -> None:
        time.sleep(max(0.0, self._at_s - time.monotonic()))
