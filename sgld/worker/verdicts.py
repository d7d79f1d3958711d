"""What an executor knows of merging: axes, proofs, and what doesn't merge. It decides; it runs nothing."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field

from sgld.worker.axes import CallAxes, Unmergeable, form, hypothesis, with_results
from sgld.worker.batch import Trait, merge_key
from sgld.worker.calls import Call
from sgld.worker.digests import Digests
from sgld.worker.recent import Recent
from sgld.worker.trees import Path

logger = logging.getLogger(__name__)
# A form of calls with so many refused keys and no proof isn't tried with further ones.
MAX_REFUSALS = 3
# One merged forward in so many is checked again.
RECHECK_EVERY = 1000

AxesKey = tuple[str, str, str]
"""Component, method and form of a call."""


def axes_key(call: Call) -> AxesKey:
    """Calls with an equal one have equal axes."""
    return call.component, call.method, form(call.tree)


@dataclass
class Proof:
    """Merged forwards of a key were equal to single ones, while calls differed in the traits that it `covers`."""

    covers: set[Trait]
    num_ticks: int = 0

    def is_due(self) -> bool:
        """Count one more merged forward: is it one to check again?"""
        is_due = self.is_next_due
        self.num_ticks += 1
        return is_due

    @property
    def is_next_due(self) -> bool:
        """Whether the next merged forward is one to check again."""
        return (self.num_ticks + 1) % RECHECK_EVERY == 0


@dataclass
class Form:
    """What was seen of all calls of one form."""

    pinned: set[Trait] = field(default_factory=set)
    """Traits that merged calls must have in common."""
    num_refused: int = 0
    is_proved: bool = False
    is_reported: bool = False


@dataclass
class Verdicts:
    """Axes and pinned traits by the form of calls; proofs and refusals by merge key."""

    axes: dict[AxesKey, CallAxes] = field(default_factory=dict)
    forms: dict[AxesKey, Form] = field(default_factory=dict)
    proved: Recent[Proof] = field(default_factory=Recent)
    refused: Recent[str] = field(default_factory=Recent)
    """Merge key to the reason."""
    modes: dict[str, str] = field(default_factory=dict)
    """Component name to merge, interleave or exclusive, as last seen."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Component name to why some of its calls don't merge, as last found out."""

    def form_of(self, call: Call) -> Form:
        """What was seen of such calls."""
        return self.forms.setdefault(axes_key(call), Form())

    def axes_of(self, call: Call) -> CallAxes:
        """What is batched in such calls, or a hypothesis.

        :raises Unmergeable: there is none.
        """
        return self.axes.get(axes_key(call)) or hypothesis(call.tree)

    def completed(self, call: Call, axes: CallAxes, result: object) -> CallAxes:
        """The axes with those of the results, kept if they were a hypothesis."""
        if axes.results is None:
            axes = self.axes[axes_key(call)] = with_results(axes, call.tree, result)
        return axes

    def merge_key(self, call: Call, digests: Digests) -> str | None:
        """The key of a call, None where it runs alone."""
        of_form = self.form_of(call)
        known = len(self.axes), len(of_form.pinned)
        if call.known_key is None or call.known_key[0] != known:
            call.known_key = known, self._computed_key(call, of_form, digests)
        key = call.known_key[1]
        has_failed = of_form.num_refused >= MAX_REFUSALS and not of_form.is_proved
        return None if has_failed or key is None or self.refused.recall(key) is not None else key

    def _computed_key(self, call: Call, of_form: Form, digests: Digests) -> str | None:
        try:
            return merge_key(call, self.axes_of(call), of_form.pinned, digests)
        except Unmergeable as reason:
            self._report(call, of_form, str(reason))
            return None

    def forget_exclusive(self) -> None:
        """A request changed nothing of what it shares: that an earlier one did isn't the pipeline's way."""
        for name in [name for name, mode in self.modes.items() if mode == "exclusive"]:
            del self.modes[name]
            self.reasons.pop(name, None)

    def accept(self, key: str, call: Call, new: Collection[Trait]) -> None:
        """Merged forwards were right while calls differed in `new`, too."""
        self.proved[key] = Proof(self.covered(key) | set(new))
        self.form_of(call).is_proved = True
        self.modes[call.component] = "merge"

    def covered(self, key: str) -> set[Trait]:
        """In what calls may differ by a proof."""
        proof = self.proved.get(key)
        return proof.covers if proof is not None else set()

    def pin(self, call: Call, traits: Collection[Trait], problem: str) -> None:
        """From now on calls of this form merge only where these traits are equal."""
        self.form_of(call).pinned.update(traits)
        named = sorted({f"{what} of {_name(path)}" if path[1:] else what for path, what in traits})
        logger.warning(
            "%s.%s is merged only with equal %s: %s", call.component, call.method, " and ".join(named), problem
        )

    def refuse(self, key: str, call: Call, reason: str) -> None:
        """Calls with this key never merge again."""
        of_form = self.form_of(call)
        of_form.num_refused += 1
        self.proved.pop(key, None)
        self.refused[key] = reason
        self._report(call, of_form, reason)

    def _report(self, call: Call, of_form: Form, reason: str) -> None:
        """One line for each form of calls."""
        if not of_form.is_reported:
            logger.warning("%s.%s is interleaved, not merged: %s", call.component, call.method, reason)
        of_form.is_reported = True
        self.reasons[call.component] = reason
        if self.modes.get(call.component) not in ("merge", "exclusive"):
            self.modes[call.component] = "interleave"


def _name(path: Path) -> str:
    """An argument as one knows it: the path without whether it is positional, which is its first part."""
    return ".".join(map(str, path[1:]))
