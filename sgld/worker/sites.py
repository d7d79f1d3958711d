"""Places in a step where a task calls its denoiser, as far as its step cache goes by their calls' numbers."""

from dataclasses import dataclass, field


@dataclass
class Skips:
    """How many calls of a task didn't run, or not as a whole, as its step cache had them skipped."""

    num: int = 0


@dataclass(eq=False)
class Site:
    """One place in a step; its calls are the same one, step after step.

    :ivar warmup_steps: its first calls, which are computed.
    :ivar max_skips: so many calls may be skipped one after the other.
    """

    warmup_steps: int
    max_skips: int
    skips: Skips = field(default_factory=Skips)
    num_calls: int = 0
    num_since: int = 0
    """Calls that were skipped since the last one that was computed."""

    @property
    def may_skip(self) -> bool:
        """Whether the next call may be skipped."""
        return self.num_calls >= self.warmup_steps and self.num_since < self.max_skips

    def computed(self) -> None:
        """A call was computed."""
        self.num_calls, self.num_since = self.num_calls + 1, 0

    def skipped(self) -> None:
        """A call was skipped."""
        self.num_calls, self.num_since = self.num_calls + 1, self.num_since + 1
        self.skips.num += 1
