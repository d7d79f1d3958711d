"""First-block caching: a denoiser's first block tells whether the others change anything that matters.

A forward runs its first block. Where the change that the block makes to the hidden states is nearly what it was at the
last computed step, the remaining blocks are skipped, and what they added then is added again. That is decided for each
call of a merged forward; where calls of one differ, those that skip leave the others, in a forward of their own.

Source: github.com/chengzeyi/ParaAttention, first_block_cache.py, as in diffusers' hooks/first_block_cache.py; after
Liu et al., Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model (arXiv 2411.19108).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sgld.errors import InvalidRequest
from sgld.outcome import Raised, on_failure, outcome_of
from sgld.worker.blocks import ELSE, Split, States
from sgld.worker.calls import Call
from sgld.worker.comparison import relative_error
from sgld.worker.sites import Site

# A skipped forward with what was kept of the same step is the computed one, but for rounding.
_MAX_ERRORS = {torch.float64: 1e-6, torch.float32: 1e-3}
_MAX_ERROR = 0.05
Forward = Callable[[Sequence[Call]], list[Any]]
"""Runs calls as one forward, and returns the result of each."""


@dataclass(frozen=True)
class Residuals:
    """What the first block of a computed forward added, and what all the others did."""

    head: torch.Tensor
    tail: States


@dataclass(eq=False)
class FirstBlockSite(Site):
    """A site whose calls may skip all blocks but the first."""

    threshold: float = 0.0
    split: Split = field(kw_only=True)
    residuals: Residuals | None = None


@dataclass(frozen=True)
class Member:
    """A call of a forward, and how many of its rows it has."""

    call: Call
    site: FirstBlockSite
    num_rows: int


def answered(calls: Sequence[Call], num_rows: Sequence[int], forward: Forward) -> tuple[list[Any], int]:
    """The results of calls that share a forward, and of how many of them the blocks were skipped.

    Their sites change when all went well.

    :param num_rows: the rows of each call.
    :raises InvalidRequest: this model does more than its blocks do.
    """
    sites = [call.site for call in calls if call.site is not None]
    members = [Member(*both) for both in zip(calls, sites, num_rows, strict=True)]
    one, values = _passed(members, None, forward)
    if any(one.skips) and not all(one.skips):
        return _parted(members, one.skips, forward), sum(one.skips)
    return _settled(members, one, values, forward), sum(one.skips)


def _passed(members: Sequence[Member], skips: bool | None, forward: Forward) -> tuple["_Pass", list[Any]]:
    one, split = _Pass(members, skips), members[0].site.split
    with split.during(one):
        values = forward([member.call for member in members])
    for member in members:
        member.site.split.learn_from(split)
    return one, values


def _parted(members: Sequence[Member], skips: Sequence[bool], forward: Forward) -> list[Any]:
    """The results of those that skip and of those that don't, each in a forward of their own."""
    values: dict[int, Any] = {}
    for skip in (True, False):
        indexes = [i for i, skipped in enumerate(skips) if skipped is skip]
        part = [members[i] for i in indexes]
        one, made = _passed(part, skip, forward)
        values |= dict(zip(indexes, _settled(part, one, made, forward), strict=True))
    return [values[i] for i in range(len(members))]


def _settled(members: Sequence[Member], one: "_Pass", values: list[Any], forward: Forward) -> list[Any]:
    """Take note of a forward in which all skipped, or none."""
    if all(one.skips):
        for member in members:
            member.site.skipped()
        return values
    before = [member.site.residuals for member in members]
    for member, residuals in zip(members, one.residuals(), strict=True):
        member.site.residuals = residuals

    def restore() -> None:
        for member, residuals_before in zip(members, before, strict=True):
            member.site.residuals = residuals_before

    with on_failure(restore):
        _test(members, values, forward)
    for member in members:
        member.site.computed()
    return values


def _test(members: Sequence[Member], values: Sequence[Any], forward: Forward) -> None:
    """Once for each request: skipping with what was just computed must return what was just computed."""
    if all(member.site.split.is_tested for member in members):
        return
    kind = type(members[0].call.module).__name__
    passed = outcome_of(functools.partial(_passed, members, True, forward), passes=(torch.OutOfMemoryError,))
    if isinstance(passed, Raised):
        problem = f"{kind} can't do without its other blocks: {passed.error}"
        raise InvalidRequest(f"{problem}; {ELSE}", "cache") from passed.error
    _, again = passed.value
    for member, value, other in zip(members, values, again, strict=True):
        error = relative_error(other, value)
        if not error <= _MAX_ERRORS.get(_kept(member).head.dtype, _MAX_ERROR):
            problem = f"{kind} does more between its blocks than can be added again (a result is off by {error:.2g})"
            raise InvalidRequest(f"{problem}; {ELSE}", "cache")
        member.site.split.is_tested = True


class _Pass:
    """One forward.

    :param skips: whether all skip, or none; None: the first block tells.
    """

    def __init__(self, members: Sequence[Member], skips: bool | None) -> None:
        self._members = members
        self._asked = skips
        self.skips = [bool(skips)] * len(members)
        self.is_skipping = bool(skips)
        self._head: torch.Tensor | None = None
        self._start: States | None = None
        self._end: States | None = None

    def begun(self, given: torch.Tensor, returned: States) -> States:
        """The first block ran; what it returns to the model instead."""
        head = returned.hidden - given
        if self._asked is None:
            self.skips = _skips(self._members, [head[rows] for rows in self._rows(head)])
            # Where calls differ, the rest of this forward is thrown away.
            self.is_skipping = any(self.skips)
        if all(self.skips):
            return _added(returned, [_kept(member).tail for member in self._members])
        self._head, self._start = head, returned
        return returned

    def ended(self, returned: States) -> None:
        """The last block ran."""
        self._end = returned

    def residuals(self) -> list[Residuals]:
        """After a computed forward: those of each call."""
        assert self._head is not None
        assert self._start is not None
        assert self._end is not None
        tail = _between(self._start, self._end)
        return [Residuals(self._head[rows].clone(), tail.rows(rows)) for rows in self._rows(self._head)]

    def _rows(self, hidden: torch.Tensor) -> list[slice]:
        """The part of each call of the rows of hidden states: a model may make several of each sample."""
        nums = [member.num_rows for member in self._members]
        ends = [sum(nums[: n + 1]) * len(hidden) // sum(nums) for n in range(len(nums))]
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _kept(member: Member) -> Residuals:
    assert member.site.residuals is not None
    return member.site.residuals


@torch.no_grad()
def _skips(members: Sequence[Member], heads: Sequence[torch.Tensor]) -> list[bool]:
    """Which calls skip: what their first block adds changed by their threshold at most. Read from the device at once.

    :param heads: what it adds for each.
    """
    changes: dict[int, torch.Tensor] = {}
    for i, (member, head) in enumerate(zip(members, heads, strict=True)):
        kept = member.site.residuals
        if member.site.may_skip and kept is not None and kept.head.shape == head.shape:
            changes[i] = (head - kept.head).abs().mean() / kept.head.abs().mean()
    read = dict(zip(changes, torch.stack([*changes.values()]).tolist(), strict=True)) if changes else {}
    # A change that isn't a number is too large.
    return [i in read and read[i] <= member.site.threshold for i, member in enumerate(members)]


def _added(states: States, tails: Sequence[States]) -> States:
    hidden = states.hidden + torch.cat([tail.hidden for tail in tails])
    texts = [tail.text for tail in tails if tail.text is not None]
    return States(hidden, states.text + torch.cat(texts) if texts and states.text is not None else states.text)


def _between(start: States, end: States) -> States:
    """What was added between two blocks; the last may return text and picture in one, the text first."""
    hidden, text = end.hidden, end.text
    if start.text is not None and text is None and hidden.shape[1] == start.hidden.shape[1] + start.text.shape[1]:
        num_tokens = start.text.shape[1]
        text, hidden = hidden[:, :num_tokens], hidden[:, num_tokens:]
    if hidden.shape != start.hidden.shape:
        shapes = f"{tuple(start.hidden.shape)}, the last {tuple(hidden.shape)}"
        raise InvalidRequest(f"the first block of this model returns {shapes}; {ELSE}", "cache")
    return States(hidden - start.hidden, None if text is None or start.text is None else text - start.text)
