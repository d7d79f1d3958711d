"""Where the calls of tasks run: single forwards, merged ones, and the proof that merging is right."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sgld.config import ConditioningConfig
from sgld.messages import Variant
from sgld.outcome import Outcome, Value, outcome_of
from sgld.worker import batch, first_block, proof
from sgld.worker.adapted_layer import Unmixable
from sgld.worker.axes import CallAxes, Unmergeable, num_rows
from sgld.worker.batch import ADAPTERS, Trait
from sgld.worker.calls import Call
from sgld.worker.clock import Clock, HostClock, Span
from sgld.worker.digests import Digests
from sgld.worker.recent import Recent
from sgld.worker.reuse import Encodings
from sgld.worker.runtime import Runtime
from sgld.worker.trees import Path
from sgld.worker.verdicts import Verdicts, axes_key


@dataclass(frozen=True)
class Tick:
    """One execution: the outcome of each call and what it takes; the device may not be done with it.

    `is_merged`: the calls shared a forward. `is_timed`: the time is that of the calls alone. `cost_key`: that of the
    largest call, for where calls of different sizes share a forward, each row takes as long as the largest one.
    `num_reused`: calls that were answered with what was known. `variant`: how the forward ran. `is_proof`: it was one.
    """

    outcomes: list[Outcome]
    span: Span
    is_merged: bool
    is_timed: bool
    cost_key: str
    num_reused: int = 0
    variant: Variant = "eager"
    is_proof: bool = False


class Executor:
    """Runs calls in the thread that owns the device.

    :param verdicts: what is known of merging already.
    :param runtime: runs the components.
    :param clock: times the work.
    :param pulse: called after each forward where one command takes several.
    :param max_encodings_bytes: how much is kept of what text encoders returned.
    """

    def __init__(
        self,
        verdicts: Verdicts | None = None,
        runtime: Runtime | None = None,
        *,
        merge: bool = True,
        clock: Clock | None = None,
        pulse: Callable[[], None] = lambda: None,
        max_encodings_bytes: int = ConditioningConfig().max_bytes,
    ) -> None:
        self.pulse = pulse
        self.verdicts = verdicts or Verdicts()
        self.runtime = runtime or Runtime()
        self.merges = merge
        self.num_proofs = 0
        self.num_parted = 0
        """Merged forwards of which some calls left after the first block."""
        self.clock: Clock = clock or HostClock()
        self._digests = Digests()
        self._encodings = Encodings(self._digests, max_encodings_bytes)
        self._max_rows: Recent[int] = Recent()
        """Merge key to the rows that memory has room for, where it was too small for more."""

    def knows(self, call: Call) -> bool:
        """Whether the axes of such calls are known."""
        return axes_key(call) in self.verdicts.axes

    def merge_key(self, call: Call) -> str | None:
        """What calls must have in common to share a forward with this one; None: it runs alone.

        Decoding runs alone: it fills the device at one sample, and its memory grows with each more.
        """
        if not self.merges or call.kind == "decode":
            return None
        return self.verdicts.merge_key(call, self._digests)

    def run(self, calls: Sequence[Call]) -> Tick:
        """Run calls with equal merge keys, as one forward if that is proved right.

        :raises RuntimeError: the device has failed.
        """
        cost_key = cost_key_of(calls)
        self.runtime.look()
        num_irregular, num_proofs = self.runtime.num_irregular, self.num_proofs
        span = self.clock.begin()
        outcomes, is_merged, is_timed, num_reused = self._answer(calls)
        span.end()
        if not all(isinstance(outcome, Value) for outcome in outcomes):
            # Was it the device? Then what failed may be what it was given before, and no call is to blame.
            self.clock.settle()
        is_timed &= self.runtime.num_irregular == num_irregular
        is_proof = self.num_proofs > num_proofs
        return Tick(outcomes, span, is_merged, is_timed, cost_key, num_reused, self.runtime.variant, is_proof)

    def proved(self, calls: Sequence[Call]) -> tuple[CallAxes, Any] | None:
        """The axes of calls that are known to share a forward, and its arguments; None: not as they are."""
        key = self.merge_key(calls[0])
        if key is None or any(self.merge_key(call) != key for call in calls[1:]):
            return None
        axes, known = self.verdicts.axes_of(calls[0]), self.verdicts.proved.recall(key)
        if known is None or batch.differing(calls, axes, self._digests, skip=known.covers):
            return None
        # One that is checked again is counted where that is done.
        if known.is_next_due or len(self._parts(key, calls, axes)) > 1:
            return None
        known.num_ticks += 1
        return axes, batch.merged_tree(calls, axes, batch.to_expand(calls[0], axes, known.covers))

    def _answer(self, calls: Sequence[Call]) -> tuple[list[Outcome], bool, bool, int]:
        """Run the calls, except for text that was encoded before; the last is how often that was."""
        keys = {call.id: key for call in calls if (key := self._encodings.key(call)) is not None}
        known = {n: Value(value) for n, key in keys.items() if (value := self._encodings.recall(key)) is not None}
        rest = [call for call in calls if call.id not in known]
        num_draws = sum(call.random.num_draws for call in rest)
        outcomes, is_merged, is_timed = self._run(rest) if rest else ([], False, False)
        is_certain = not is_merged and sum(call.random.num_draws for call in rest) == num_draws
        for call, outcome in zip(rest, outcomes, strict=True):
            if is_certain and call.id in keys and isinstance(outcome, Value):
                self._encodings.keep(keys[call.id], outcome.value)
        answers = iter(outcomes)
        return [known.get(call.id) or next(answers) for call in calls], is_merged, is_timed and not known, len(known)

    def _run(self, calls: Sequence[Call]) -> tuple[list[Outcome], bool, bool]:
        if self.runtime.parts_rows:
            for call in calls:
                call.axes = self._axes_or_none(call)
        if len(calls) == 1:
            return [single(calls[0])], False, True
        key = self.merge_key(calls[0])
        if key is None or any(self.merge_key(call) != key for call in calls[1:]):
            # What is known of merging changed since these calls were put together.
            return self._singly(calls), False, False
        axes = self.verdicts.axes_of(calls[0])
        known = self.verdicts.proved.recall(key)
        new = batch.differing(calls, axes, self._digests, skip=known.covers if known is not None else ())
        if known is None or new:
            return self._prove(key, calls, axes, new), False, False
        if known.is_due():
            self._max_rows.pop(key, None)  # what others took of the memory may be free again
            return self._prove(key, calls, axes, new), False, False
        outcomes, is_timed = self._merged(key, calls, axes, batch.to_expand(calls[0], axes, known.covers))
        return outcomes, True, is_timed

    def _axes_or_none(self, call: Call) -> CallAxes | None:
        try:
            return self.verdicts.axes_of(call)
        except Unmergeable:
            return None

    def _singly(self, calls: Sequence[Call]) -> list[Outcome]:
        outcomes = []
        for call in calls:
            outcomes.append(single(call))
            self.pulse()
        return outcomes

    def _merged(
        self, key: str, calls: Sequence[Call], axes: CallAxes, expanded: set[Path]
    ) -> tuple[list[Outcome], bool]:
        """One forward, or as many as memory needs; call by call when it fails in Python: only the culprit fails.

        :return: the outcomes, and whether all went as it goes the next time.
        """
        parts = self._parts(key, calls, axes)
        if len(parts) > 1:
            done = [self._merged(key, part, axes, expanded) for part in parts]
            return [outcome for outcomes, _ in done for outcome in outcomes], all(is_usual for _, is_usual in done)
        if len(calls) == 1:
            return self._singly(calls), True
        merged = outcome_of(functools.partial(self._values, calls, axes, expanded))
        if isinstance(merged, Value):
            return [Value(value) for value in merged.value], True
        self.pulse()
        if isinstance(merged.error, torch.OutOfMemoryError):
            self._halve(key, calls, axes)
            return self._merged(key, calls, axes, expanded)[0], False
        outcomes = self._singly(calls)
        if isinstance(merged.error, Unmixable):
            # Other layers have adapters than in the proof.
            self.verdicts.pin(calls[0], {ADAPTERS}, str(merged.error))
        elif all(isinstance(outcome, Value) for outcome in outcomes):
            self.verdicts.refuse(key, calls[0], f"the merged forward raised {merged.error!r}")
        return outcomes, False

    def _values(self, calls: Sequence[Call], axes: CallAxes, expanded: set[Path]) -> list[object]:
        """The results of one forward; of two, where first blocks tell that some calls skip and others don't."""

        def forward(part: Sequence[Call]) -> list[object]:
            if len(part) == 1:
                return [proof.alone(part[0])]
            return batch.split(proof.forward(part, batch.merged_tree(part, axes, expanded), axes), part, axes)

        if calls[0].site is None:
            return forward(calls)
        values, num_skipped = first_block.answered(calls, [num_rows(call.tree, axes) for call in calls], forward)
        self.num_parted += 0 < num_skipped < len(calls)
        return values

    def _parts(self, key: str, calls: Sequence[Call], axes: CallAxes) -> list[list[Call]]:
        """The calls in parts for which memory has room, as far as that is known."""
        max_rows = self._max_rows.recall(key)
        parts: list[list[Call]] = [[]]
        for call in calls:
            if max_rows is not None and parts[-1] and _num_rows([*parts[-1], call], axes) > max_rows:
                parts.append([])
            parts[-1].append(call)
        return parts

    def _halve(self, key: str, calls: Sequence[Call], axes: CallAxes) -> None:
        """Remember that so many calls were too many, so that not each of their forwards fails first."""
        self._max_rows[key] = (_num_rows(calls, axes) + 1) // 2
        self._encodings.clear()

    def _prove(self, key: str, calls: Sequence[Call], axes: CallAxes, new: set[Trait]) -> list[Outcome]:
        """Answer from single forwards, and see whether merged ones agree.

        A proof covers only what differed in it. Where memory is too small for it, the next has half of the calls.
        """
        self.num_proofs += 1
        part, new = self._to_prove(key, calls, axes, new)
        expanded = batch.to_expand(part[0], axes, self.verdicts.covered(key) | new)
        outcomes: list[Outcome] = []
        try:
            # Before the single forwards: models take things out of the dicts that they are given.
            mixed = batch.merged_tree(part, axes, expanded)
            repeated = batch.merged_tree([part[0]] * len(part), axes, expanded)
            num_draws = sum(call.random.num_draws for call in calls)
            outcomes = self._singly(calls)
            if not all(isinstance(outcome, Value) for outcome in outcomes):
                return outcomes
            if sum(call.random.num_draws for call in calls) != num_draws:
                self.verdicts.refuse(key, calls[0], "it draws from the global random number generator")
                return outcomes
            values = _computed(calls, outcomes)
            axes = self.verdicts.completed(calls[0], axes, values[0])
            problem = proof.problem(part, axes, values[: len(part)], mixed, repeated, self.pulse)
            self._judge(key, part, axes, new, problem)
        except torch.OutOfMemoryError as error:
            self._halve(key, part, axes)
            if len(part) == 2 and key not in self.verdicts.proved:
                self.verdicts.refuse(key, calls[0], f"the merged forward raised {error!r}")
        except (Unmergeable, RuntimeError) as error:
            self.verdicts.refuse(key, calls[0], str(error))
        return outcomes or self._singly(calls)

    def _to_prove(
        self, key: str, calls: Sequence[Call], axes: CallAxes, new: set[Trait]
    ) -> tuple[Sequence[Call], set[Trait]]:
        """Those of the calls for which memory has room, two at least, and in what they differ that isn't proved."""
        part = self._parts(key, calls, axes)[0]
        part = part if len(part) > 1 else list(calls[:2])
        if len(part) == len(calls):
            return part, new
        return part, batch.differing(part, axes, self._digests, skip=self.verdicts.covered(key))

    def _judge(self, key: str, calls: Sequence[Call], axes: CallAxes, new: set[Trait], problem: str | None) -> None:
        """Keep what came of a proof.

        1. It was right: calls may differ in that.
        2. They differed in more than values: that must be equal from now on.
        3. Or in adapters, and these alone make it wrong.
        4. Or in values that were equal in an earlier proof: these must.
        5. Or in several values at once: those must that make a forward wrong by themselves.
        6. Else such calls don't merge.
        """
        verdicts, call = self.verdicts, calls[0]
        if problem is None:
            verdicts.accept(key, call, new)
            return
        has_adapters, new = ADAPTERS in new, new - {ADAPTERS}
        if beyond_values := {trait for trait in new if trait[1] != "value"}:
            verdicts.pin(call, beyond_values, problem)
        elif has_adapters and (guilty := self._guilty(calls, axes, {ADAPTERS})):
            verdicts.pin(call, guilty, problem)
        elif new and key in verdicts.proved and (axes.reference, "value") not in new:
            verdicts.pin(call, new, problem)
        elif guilty := self._guilty(calls, axes, new):
            verdicts.pin(call, guilty, problem)
        else:
            verdicts.refuse(key, call, problem)

    def _guilty(self, calls: Sequence[Call], axes: CallAxes, suspects: set[Trait]) -> set[Trait]:
        """Which of the traits make a merged forward wrong; each is tried with the first call that differs in it."""
        guilty: set[Trait] = set()
        for other in calls[1:]:
            tried = suspects & batch.differing([calls[0], other], axes, self._digests)
            guilty |= proof.culprits(calls[0], other, axes, tried, self.pulse)
            suspects = suspects - tried
        return guilty


def single(call: Call) -> Outcome:
    """Run one call with the very arguments that the task gave."""

    def ran() -> Any:
        with call.random.entered():
            if call.site is not None:
                (value,), _ = first_block.answered([call], [1], lambda _: [proof.alone(call)])
                return value
            return call.run(call.args, call.kwargs)

    return outcome_of(ran)


def _computed(calls: Sequence[Call], outcomes: Sequence[Outcome]) -> list[Any]:
    """The results of calls that succeeded, also of those whose blocks were skipped."""
    return [
        outcome.value if call.site is None or not call.site.num_since else proof.alone(call)
        for call, outcome in zip(calls, outcomes, strict=True)
        if isinstance(outcome, Value)
    ]


def _num_rows(calls: Sequence[Call], axes: CallAxes) -> int:
    return sum(num_rows(call.tree, axes) for call in calls)


def _num_elements(call: Call) -> int:
    return sum(tensor.numel() for tensor in call.tensors)


def cost_key_of(calls: Sequence[Call]) -> str:
    """That of the largest: where calls of different sizes share a forward each takes as long."""
    return max(calls, key=_num_elements).cost_key
