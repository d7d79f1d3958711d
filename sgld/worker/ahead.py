"""How far a rank is ahead of its device: ticks that it launched and that the device may not be done with.

While the device computes, the host launches the next tick, and none waits for the other. It does so as late as it may:
what is launched can't be changed any more, and whoever comes meanwhile waits for it.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import fmean

import msgspec

from sgld.messages import Idle, Launched, Pending, Ran, Stepped
from sgld.worker.clock import Span
from sgld.worker.recent import Recent

# More than one tick on its way, beside the one that is launched next, would only make others wait.
MAX_AHEAD = 1
# Beside launching itself, the device may need the next tick this much earlier than predicted: the front decides
# (1 ms), the first kernels come slowly, and no two forwards take the same time.
MARGIN_S = 0.005
MARGIN_SHARE = 0.03
# So many ticks each way show whether they take longer: by more than this, as no two take the same time.
NUM_TRIED = 8
SLOWER_SHARE = 0.01
# Nobody can wait for less.
LEAST_S = 1e-4
# How long a rank that waits for its device may overlook that a tick is over.
LOOK_S = 0.002
News = Idle | Launched | Pending | Ran | Stepped


@dataclass(frozen=True)
class Usual:
    """What the last tick like this took: on the device, and to launch."""

    elapsed_s: float
    launch_s: float
    before_s: float
    """What the one before it took on the device."""
    whole_s: tuple[float, ...] = ()
    """What the first ticks took that were launched as a whole while the device was busy."""
    part_s: tuple[float, ...] = ()
    """And those after them, of which only a part was."""

    @property
    def least_s(self) -> float:
        """What the next one takes at least.

        A device that had nothing to do waits for the first launches, which counts as its time. Who believed that would
        launch the next tick too late, so that it takes long in turn.
        """
        return min(self.elapsed_s, self.before_s)

    @property
    def lead_s(self) -> float:
        """How long before the device needs the next one its launch has to begin.

        A device that computes for longer than the host launches is never behind it: a part of the launches is enough.
        What these take by themselves isn't known, as of large forwards only so many wait in the device's queue, and the
        host for room in it. So it is tried, and given up where forwards take longer then.
        """
        is_tried = len(self.whole_s) == NUM_TRIED
        is_slower = len(self.part_s) == NUM_TRIED and fmean(self.part_s) > fmean(self.whole_s) * (1 + SLOWER_SHARE)
        return max(0.0, self.launch_s - self.elapsed_s) if is_tried and not is_slower else self.launch_s

    def then(self, span: Span) -> "Usual":
        """After one more."""
        whole_s, part_s = self.whole_s, self.part_s
        if span.lead_s > 0.0 and len(whole_s) < NUM_TRIED:
            whole_s += (span.elapsed_s,)
        elif span.lead_s > 0.0 and len(part_s) < NUM_TRIED:
            part_s += (span.elapsed_s,)
        return Usual(span.elapsed_s, span.launch_s, self.elapsed_s, whole_s, part_s)


@dataclass
class OnItsWay:
    """A tick that was launched, and what is told when it is over."""

    ran: Ran
    span: Span
    steps: list[Stepped] = field(default_factory=list)
    ends: list[Callable[[], None]] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Ticks with an equal one take the same time."""
        return f"{self.ran.cost_key} {self.ran.rows} {self.ran.variant} {self.ran.ranks}"


class Ahead:
    """The ticks on their way, the oldest first.

    :param now_ns: the clock of the host.
    """

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self._ticks: deque[OnItsWay] = deque()
        self._usual: Recent[Usual] = Recent()
        self._now_ns = now_ns

    def __len__(self) -> int:
        return len(self._ticks)

    def add(self, ran: Ran, span: Span) -> None:
        """A tick was launched; its times are filled in when it is over."""
        self._ticks.append(OnItsWay(ran, span))

    def stepped(self, step: Stepped) -> bool:
        """A task is a step further once the last tick is over; False: all are over."""
        if self._ticks:
            self._ticks[-1].steps.append(step)
        return bool(self._ticks)

    def ended(self, tell: Callable[[], None]) -> bool:
        """The end of a task is told once the last tick is over; False: all are over."""
        if self._ticks:
            self._ticks[-1].ends.append(tell)
        return bool(self._ticks)

    def over(self) -> Iterator[OnItsWay]:
        """The ticks that are over by now, with their times; never waits."""
        while self._ticks and self._ticks[0].span.is_over():
            tick = self._ticks.popleft()
            span = tick.span
            tick.ran = msgspec.structs.replace(
                tick.ran,
                started_ns=span.started_ns,
                elapsed_s=span.elapsed_s,
                launch_s=span.launch_s,
                lead_s=span.lead_s,
            )
            if tick.ran.is_timed:
                before = self._usual.recall(tick.kind) or Usual(span.elapsed_s, span.launch_s, span.elapsed_s)
                self._usual[tick.kind] = before.then(span)
            yield tick

    def wait(self, num_left: int = MAX_AHEAD) -> None:
        """Wait until no more than so many are on their way."""
        if len(self._ticks) > num_left:
            self._ticks[-1 - num_left].span.wait()

    def spare_s(self) -> float:
        """How much later the next tick may be launched without the device being idle; 0 where that isn't known."""
        if not self._ticks:
            return 0.0
        usual = [self._usual.recall(tick.kind) for tick in self._ticks]
        known = [each for each in usual if each is not None]
        if len(known) < len(usual):
            return 0.0
        busy_s = sum(each.least_s for each in known)
        lead_s = known[-1].lead_s + MARGIN_S + MARGIN_SHARE * busy_s
        span, now_ns = self._ticks[0].span, self._now_ns()
        done_s = (now_ns - span.started_ns) / 1e9 if span.has_begun() else 0.0
        spare_s = busy_s - done_s - lead_s
        return spare_s if spare_s > LEAST_S else 0.0
