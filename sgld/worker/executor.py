"""Where the calls of tasks run: single forwards, merged ones, and the proof that merging is right."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sgld.worker import batch
from sgld.worker.axes import CallAxes, Unmergeable, form, hypothesis, with_results
from sgld.worker.calls import Call
from sgld.worker.task import Outcome, Raised, Value
from sgld.worker.trees import Path, leaves, rebuilt

logger = logging.getLogger(__name__)
# A mixed batch may be this much further from single forwards than a batch of one row repeated: batching alone changes
# the order of summation.
PROOF_FACTOR = 4.0
# Below these relative errors a difference is rounding: 16 units in the last place of float32, half a unit otherwise.
_FLOORS = {torch.float64: 1e-12, torch.float32: 16 * torch.finfo(torch.float32).eps}

AxesKey = tuple[str, str, str]
"""Component, method and form of a call."""


@dataclass(frozen=True)
class Tick:
    """One execution: the outcome of each call and what it took.

    `is_merged`: the calls shared a forward. `is_timed`: the time is that of the forward alone.
    """

    outcomes: list[Outcome]
    elapsed_s: float
    is_merged: bool
    is_timed: bool


@dataclass
class Verdicts:
    """What is known of merging: axes by the form of calls, proofs and refusals by merge key."""

    axes: dict[AxesKey, CallAxes] = field(default_factory=dict)
    proved: dict[str, set[Path]] = field(default_factory=dict)
    """Merge key to the arguments that differed in a proof."""
    refused: dict[str, str] = field(default_factory=dict)
    """Merge key to the reason."""
    by_value: dict[AxesKey, set[Path]] = field(default_factory=dict)
    """Batched arguments that the model reads from one row only."""
    modes: dict[str, str] = field(default_factory=dict)
    """Component name to merge, interleave or exclusive, as last seen."""


class Executor:
    """Runs calls in the thread that owns the device.

    :param verdicts: what is known of merging already.
    :param synchronize: waits for the device, so that times are those of the work.
    :param pulse: called after each forward where one command takes several.
    """

    def __init__(
        self,
        verdicts: Verdicts | None = None,
        *,
        merge: bool = True,
        synchronize: Callable[[], None] = lambda: None,
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        self.pulse = pulse
        self.verdicts = verdicts or Verdicts()
        self.merges = merge
        self._synchronize = synchronize
        self._digests = batch.Digests()
        self._proof_sizes: dict[str, int] = {}

    def knows(self, call: Call) -> bool:
        """Whether the axes of such calls are known."""
        return axes_key(call) in self.verdicts.axes

    def merge_key(self, call: Call) -> str | None:
        """What calls must have in common to share a forward with this one; None: it runs alone.

        Decoding runs alone: it fills the device at one sample, and its memory grows with each more.
        """
        if not self.merges or call.kind == "decode":
            return None
        known = len(self.verdicts.axes), sum(map(len, self.verdicts.by_value.values()))
        if call.known_key is None or call.known_key[0] != known:
            call.known_key = known, self._computed_key(call)
        key = call.known_key[1]
        return None if key in self.verdicts.refused else key

    def _computed_key(self, call: Call) -> str | None:
        try:
            return batch.merge_key(call, self._axes(call), self._by_value(call), self._digests)
        except Unmergeable:
            return None

    def run(self, calls: Sequence[Call]) -> Tick:
        """Run calls with equal merge keys, as one forward if that is proved right."""
        start = time.perf_counter()
        outcomes, is_merged, is_timed = self._run(calls)
        self._synchronize()
        return Tick(outcomes, time.perf_counter() - start, is_merged, is_timed)

    def _run(self, calls: Sequence[Call]) -> tuple[list[Outcome], bool, bool]:
        if len(calls) == 1:
            return [single(calls[0])], False, True
        key = self.merge_key(calls[0])
        if key is None or any(self.merge_key(call) != key for call in calls[1:]):
            # What is known of merging changed since these calls were put together.
            return self._singly(calls), False, False
        axes = self._axes(calls[0])
        seen = self.verdicts.proved.get(key)
        new = batch.differing(calls, axes, self._digests, skip=seen or ())
        if seen is None or new:
            return self._prove(key, calls, axes, new), False, False
        outcomes = self._merged(key, calls, axes, seen)
        return outcomes, True, True

    def _singly(self, calls: Sequence[Call]) -> list[Outcome]:
        outcomes = []
        for call in calls:
            outcomes.append(single(call))
            self.pulse()
        return outcomes

    def _merged(self, key: str, calls: Sequence[Call], axes: CallAxes, expanded: set[Path]) -> list[Outcome]:
        """One forward; when it fails in Python, call by call, so that only the culprit fails."""
        if len(calls) == 1:
            return self._singly(calls)
        # What follows a failure comes after its `except`: until there its traceback holds what the forward allocated.
        problem = None
        try:
            result = _forward(calls[0], batch.merged_tree(calls, axes, expanded))
            return [Value(value) for value in batch.split(result, calls, axes)]
        except torch.OutOfMemoryError:
            pass
        except Exception as error:  # noqa: BLE001 - whatever a model raises on a merged batch, the calls run singly
            problem = f"the merged forward raised {error!r}"
        self.pulse()
        if problem is None:
            half = len(calls) // 2
            return [o for part in (calls[:half], calls[half:]) for o in self._merged(key, part, axes, expanded)]
        outcomes = self._singly(calls)
        if all(isinstance(outcome, Value) for outcome in outcomes):
            self._refuse(key, calls[0], problem)
        return outcomes

    def _prove(self, key: str, calls: Sequence[Call], axes: CallAxes, new: set[Path]) -> list[Outcome]:
        """Answer from single forwards, and see whether merged ones agree.

        A proof covers only the arguments that differed in it. Where only those added since an earlier proof can be to
        blame, they are compared by value from now on. Where memory is too small for it, the next has half of the calls.
        """
        seen = self.verdicts.proved.get(key, set())
        part = calls[: self._proof_sizes.get(key, len(calls))]
        if len(part) < len(calls):
            new = batch.differing(part, axes, self._digests, skip=seen)
        outcomes = []
        try:
            # Before the single forwards: models take things out of the dicts that they are given.
            mixed = batch.merged_tree(part, axes, seen | new)
            repeated = batch.merged_tree([part[0]] * len(part), axes, seen | new)
            outcomes = self._singly(calls)
            values = [outcome.value for outcome in outcomes if isinstance(outcome, Value)]
            if len(values) < len(calls):
                return outcomes
            problem = self._problem(part, axes, values[: len(part)], mixed, repeated)
        except torch.OutOfMemoryError as error:
            problem = f"the merged forward raised {error!r}"
            if len(part) > 2:
                self._proof_sizes[key] = (len(part) + 1) // 2
                return outcomes or self._singly(calls)
        self._judge(key, calls[0], new, problem)
        return outcomes or self._singly(calls)

    def _judge(self, key: str, call: Call, new: set[Path], problem: str | None) -> None:
        """Keep what came of a proof."""
        if problem is None:
            self.verdicts.proved[key] = self.verdicts.proved.get(key, set()) | new
            self.verdicts.modes[call.component] = "merge"
        elif key in self.verdicts.proved:
            logger.warning("%s is compared by value from now on: %s", sorted(map(str, new)), problem)
            self.verdicts.by_value.setdefault(axes_key(call), set()).update(new)
        else:
            self._refuse(key, call, problem)

    def _problem(
        self, calls: Sequence[Call], axes: CallAxes, values: Sequence[Any], mixed: Any, repeated: Any
    ) -> str | None:
        """Why the merged forward isn't right, or None.

        :raises torch.OutOfMemoryError: the device has too little memory for so many calls.
        """
        try:
            axes = self._complete(calls[0], axes, values[0])
            merged = batch.split(_forward(calls[0], mixed), calls, axes)
            self.pulse()
            same = batch.split(_forward(calls[0], repeated), [calls[0]] * len(calls), axes)
            errors = [batch.relative_error(m, v) for m, v in zip(merged, values, strict=True)]
            repeated_error = batch.relative_error(same[0], values[0])
        except torch.OutOfMemoryError:
            raise
        except Exception as raised:  # noqa: BLE001 - whatever a model raises on a merged batch, it isn't merged
            return f"the merged forward raised {raised!r}"
        bound = max(PROOF_FACTOR * repeated_error, _floor(values[0]))
        # Not their maximum, which may overlook one that isn't a number.
        too_large = [error for error in errors if not error <= bound]
        if not too_large:
            return None
        return f"merged results differ by {too_large[0]:.2g} (relative) from single ones, {bound:.2g} is allowed"

    def _refuse(self, key: str, call: Call, reason: str) -> None:
        logger.warning("%s.%s is interleaved, not merged: %s", call.component, call.method, reason)
        self.verdicts.refused[key] = reason
        if self.verdicts.modes.get(call.component) != "merge":
            self.verdicts.modes[call.component] = "interleave"

    def _axes(self, call: Call) -> CallAxes:
        return self.verdicts.axes.get(axes_key(call)) or hypothesis(call.tree)

    def _by_value(self, call: Call) -> set[Path]:
        return self.verdicts.by_value.get(axes_key(call), set())

    def _complete(self, call: Call, axes: CallAxes, result: Any) -> CallAxes:
        """The axes with those of the results, kept if they were a hypothesis."""
        if axes.results is None:
            axes = self.verdicts.axes[axes_key(call)] = with_results(axes, call.tree, result)
        return axes


def axes_key(call: Call) -> AxesKey:
    """Calls with an equal one have equal axes."""
    return call.component, call.method, form(call.tree)


def single(call: Call) -> Outcome:
    """Run one call with the very arguments that the task gave."""
    try:
        return Value(call.run(call.args, call.kwargs))
    except Exception as error:  # noqa: BLE001 - whatever a component raises is the outcome of the call
        return Raised(error)


def _forward(call: Call, tree: Any) -> Any:
    """Run the component on a tree of its own: models take things out of the dicts that they are given."""
    args, kwargs = rebuilt(tree, lambda _path, value: value)
    return call.run(args, kwargs)


def _floor(result: Any) -> float:
    dtypes = {leaf.dtype for _, leaf in leaves(result) if isinstance(leaf, torch.Tensor)}
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max((_FLOORS.get(dtype, torch.finfo(dtype).eps / 2) for dtype in floats), default=0.0)
