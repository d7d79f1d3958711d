"""How long work takes that an executor gives its device: a CPU's is over when it returns, a GPU's goes on."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


class Span(Protocol):
    """Some work, from `begin` of a clock on."""

    def end(self) -> None:
        """What was given to the device until now is the work."""

    def has_begun(self) -> bool:
        """Whether the device has come to it, so that `started_ns` is known; never waits."""

    def is_over(self) -> bool:
        """Whether the device is done with it; never waits."""

    def wait(self) -> None:
        """Wait until it is over."""

    @property
    def started_ns(self) -> int:
        """When the device began with it, on the clock of `time.monotonic_ns`."""

    @property
    def elapsed_s(self) -> float:
        """What it took; once it is over."""

    @property
    def launch_s(self) -> float:
        """What it took to give it to the device."""

    @property
    def lead_s(self) -> float:
        """How long before the device began with it the host did, while that was busy; once it is over."""


class Clock(Protocol):
    """Times work. One span ends before the next one begins."""

    def now_ns(self) -> int:
        """The time of the host."""

    def begin(self) -> Span:
        """From here on."""

    def settle(self) -> None:
        """Wait until the device is done with everything.

        :raises RuntimeError: something that it was given before has failed, whoever it was.
        """


@dataclass
class HostSpan:
    """Work of the calling thread, which waits for what it started elsewhere; or of another rank, which is over."""

    started_ns: int = field(default_factory=time.monotonic_ns)
    elapsed_s: float = 0.0
    settle: Callable[[], None] = lambda: None

    def end(self) -> None:
        self.settle()
        self.elapsed_s = (time.monotonic_ns() - self.started_ns) / 1e9

    @property
    def launch_s(self) -> float:
        return self.elapsed_s

    @property
    def lead_s(self) -> float:
        return 0.0

    def has_begun(self) -> bool:
        return True

    def is_over(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class HostClock:
    """A device that is done when it returns, or is waited for.

    :param settle: waits for it.
    """

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self._settle = settle

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def begin(self) -> HostSpan:
        return HostSpan(settle=self._settle)

    def settle(self) -> None:
        self._settle()


class DeviceSpan:
    """Work of a device between two events of its stream.

    :param before: the span before it, if the device may not be done with that.
    """

    def __init__(self, event: Callable[[], Any], now_ns: Callable[[], int], before: "DeviceSpan | None") -> None:
        self._first, self._last = event(), event()
        self._now_ns = now_ns
        self._launched_ns = self._started_ns = now_ns()
        self._before = before
        self.launch_s = 0.0
        self._first.record()

    def end(self) -> None:
        self._last.record()
        self.launch_s = (self._now_ns() - self._launched_ns) / 1e9

    def has_begun(self) -> bool:
        return bool(self._first.query())

    def is_over(self) -> bool:
        return bool(self._last.query())

    def wait(self) -> None:
        self._last.synchronize()

    @property
    def started_ns(self) -> int:
        """Events tell only how far they are from one another: an idle device begins at once, others after the last."""
        if self._before is not None:
            before, self._before = self._before, None
            self._started_ns = before.ended_ns + round(1e6 * before.until(self._first))
        return self._started_ns

    @property
    def lead_s(self) -> float:
        return (self.started_ns - self._launched_ns) / 1e9

    @property
    def ended_ns(self) -> int:
        """When the device was done with it."""
        return self.started_ns + round(1e9 * self.elapsed_s)

    @property
    def elapsed_s(self) -> float:
        return float(self._first.elapsed_time(self._last)) / 1e3

    def until(self, event: Any) -> float:
        """Milliseconds from its end to an event."""
        return float(self._last.elapsed_time(event))


class DeviceClock:
    """Events of a GPU's current stream.

    :param event: makes one.
    :param settle: waits for the device.
    :param now_ns: the clock of the host.
    """

    def __init__(
        self, event: Callable[[], Any], settle: Callable[[], None], now_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._event = event
        self._settle = settle
        self.now_ns = now_ns
        self._last: DeviceSpan | None = None

    def begin(self) -> DeviceSpan:
        before = self._last if self._last is not None and not self._last.is_over() else None
        self._last = DeviceSpan(self._event, self.now_ns, before)
        return self._last

    def settle(self) -> None:
        self._settle()


def device_clock(device_type: str) -> Clock:
    """The clock of a device."""
    if device_type != "cuda":
        return HostClock()
    import torch

    # Blocking: the core of a thread that waits is free for others.
    event = functools.partial(torch.cuda.Event, enable_timing=True, blocking=True)
    return DeviceClock(event, torch.cuda.synchronize)
