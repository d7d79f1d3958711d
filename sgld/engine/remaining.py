"""How far a request is, and how long it still takes."""

from collections import Counter
from dataclasses import dataclass, field

from sgld.engine.cost import Cost
from sgld.engine.demand import CallClass, Demand, Profiles, call_class, seconds_of
from sgld.messages import CallInfo


@dataclass(eq=False)
class Tracked:
    """A request that waits or runs, as the scheduler sees it."""

    id: str
    number: int
    """In the order of arrival; some arrive at the same time."""
    arrived_at: float
    demand: Demand
    is_suspect: bool = False
    """It shares no forward: if a rank is lost again, it is known whose fault it was."""
    calls: dict[int, CallInfo] = field(default_factory=dict)
    """Those that wait, by id."""
    remaining_s: float | None = None
    """Alone; None while nothing is known."""
    _made: Counter[CallClass] = field(default_factory=Counter)
    _num_steps: int = 0
    _num_steps_done: int = 0
    _num_steps_behind: int = 0
    """Those before its latest call: done, or such as the device has."""
    _num_calls_left: int | None = None
    """Of those that follow the pipeline; None while that goes on."""
    _followed: Counter[CallClass] = field(default_factory=Counter)
    """Of these, the ones that it made."""
    _latest: CallClass | None = None
    _version: int = -1
    """Of the costs that `remaining_s` was computed with; -1: it is to be computed again."""

    @property
    def deadline_at(self) -> float | None:
        return None if self.demand.deadline_s is None else self.arrived_at + self.demand.deadline_s

    @property
    def is_preparing(self) -> bool:
        """It has made no denoising call yet, as far as is known: it encodes."""
        return not self._num_steps

    @property
    def made(self) -> Counter[CallClass]:
        """The calls that it made so far."""
        return self._made

    def pending(self, call: CallInfo) -> None:
        """A call waits; with a known id it replaces what was said before."""
        self.calls[call.id] = call
        self._num_steps_behind = call.step_index
        if call.kind == "denoise":
            self._num_steps = call.num_steps
        self._version = -1

    def ran(self, call_id: int) -> None:
        """A call ran."""
        self._latest = call_class(self.calls.pop(call_id))
        self._made[self._latest] += 1
        self._version = -1

    def stepped(self, step: int) -> None:
        """So many steps are done."""
        self._num_steps_done = step
        self._version = -1

    def processed(self, num_left: int) -> None:
        """Its frames went through the latest call, and go through so many more."""
        self._num_calls_left = num_left
        self._followed.update([self._latest] if self._latest is not None else [])
        self._version = -1

    def restart(self) -> None:
        """It begins again."""
        self.calls, self._made = {}, Counter()
        self._num_steps = self._num_steps_done = self._num_steps_behind = 0
        self._num_calls_left, self._followed = None, Counter()
        self._version = -1

    def update(self, cost: Cost, profiles: Profiles) -> bool:
        """Compute `remaining_s` if it may have changed; whether it was computed."""
        if self._version == cost.version:
            return False
        self._version = cost.version
        self.remaining_s = self._remaining_s(cost, profiles)
        return True

    def _remaining_s(self, cost: Cost, profiles: Profiles) -> float | None:
        """Before denoising, and where the number of steps isn't known: what such requests take, less what was done.

        From there on: the steps left at the cost of its own steps, and decoding. A step that the device has counts as
        done, as its calls count as made: else who has just run would seem to have more left than before, and two
        requests would take turns. After the pipeline: the calls left, at the mean cost of those that were made.
        """
        waiting = [(call_class(call), 1) for call in self.calls.values()]
        if self._num_calls_left is not None:
            followed_s = seconds_of(cost, self._followed.items())
            return None if followed_s is None else self._num_calls_left * followed_s / self._followed.total()
        if not self._num_steps:
            total_s, made_s = profiles.total_s(self.demand), seconds_of(cost, self._made.items())
            if total_s is None or made_s is None:
                return None
            return max(total_s - made_s, seconds_of(cost, waiting) or 0.0)
        denoise = [(made, number) for made, number in (*self._made.items(), *waiting) if made[0] == "denoise"]
        steps_s = seconds_of(cost, denoise)
        if steps_s is None:
            return None
        has_begun = any(made[0] == "denoise" for made, _ in waiting)
        num_steps_done = max(self._num_steps_done, self._num_steps_behind)
        step_s = steps_s / max(num_steps_done + has_begun, 1)
        num_steps_left = max(self._num_steps - num_steps_done, 0)
        decoded = [(made, number) for made, number in self._made.items() if made[0] == "decode"]
        tail_s = profiles.tail_s(self.demand) - (seconds_of(cost, decoded) or 0.0)
        return num_steps_left * step_s + max(tail_s, 0.0)
