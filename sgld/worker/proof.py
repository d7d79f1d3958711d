"""Is a merged forward right? Single forwards say so."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from sgld.outcome import Raised, outcome_of
from sgld.worker import batch
from sgld.worker.axes import CallAxes, num_rows
from sgld.worker.batch import ADAPTERS, Trait
from sgld.worker.calls import Call
from sgld.worker.comparison import relative_error
from sgld.worker.out_of_memory import one_error
from sgld.worker.trees import at, copied, leaves, opened, rebuilt

# A mixed batch may be this much further from single forwards than a batch of one row repeated: batching alone changes
# the order of summation.
PROOF_FACTOR = 4.0
# Below these relative errors a difference is rounding: 16 units in the last place of float32, half a unit otherwise.
_FLOORS = {torch.float64: 1e-12, torch.float32: 16 * torch.finfo(torch.float32).eps}
# But where half of the digits are lost, batching does more than change the order.
_MAX_LOSS = 0.5


def forward(calls: Sequence[Call], tree: Any, axes: CallAxes, *, by_row: bool = False) -> Any:
    """Run the component on a tree of its own: models take things out of the dicts that they are given."""
    args, kwargs = copied(tree)
    rows = [(call.adapters, num_rows(call.tree, axes)) for call in calls]
    return calls[0].run(args, kwargs, rows, by_row=by_row)


def alone(call: Call) -> Any:
    """Run a single call on a tree of its own."""
    args, kwargs = copied(call.tree)
    return call.run(args, kwargs)


def problem(
    calls: Sequence[Call],
    axes: CallAxes,
    values: Sequence[Any],
    mixed: Any,
    repeated: Any,
    pulse: Callable[[], None] = lambda: None,
) -> str | None:
    """Why a merged forward isn't right, or None.

    :param values: what the calls returned singly.
    :param mixed: the arguments of all calls in one forward; `repeated`: of the first one as often.
    :raises torch.OutOfMemoryError: the device has too little memory for so many calls.
    """

    @one_error()
    def measured() -> tuple[list[float], float]:
        merged = batch.split(forward(calls, mixed, axes), calls, axes)
        pulse()
        one, by_row = [calls[0]] * len(calls), len({call.adapters for call in calls}) > 1
        same = batch.split(forward(one, repeated, axes, by_row=by_row), one, axes)
        errors = [relative_error(m, v) for m, v in zip(merged, values, strict=True)]
        return errors, relative_error(same[0], values[0])

    outcome = outcome_of(measured, passes=(torch.OutOfMemoryError,))
    if isinstance(outcome, Raised):
        return f"the merged forward raised {outcome.error!r}"
    errors, repeated_error = outcome.value
    bound = _bound(values[0], repeated_error)
    # Not their maximum, which may overlook one that isn't a number.
    too_large = [error for error in errors if not error <= bound]
    if not too_large:
        return None
    return f"merged results differ by {too_large[0]:.2g} (relative) from single ones, {bound:.2g} is allowed"


def _bound(result: Any, repeated_error: float) -> float:
    """The relative error that a merged result may have."""
    dtypes = {leaf.dtype for _, leaf in leaves(opened(result)) if isinstance(leaf, torch.Tensor)}
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    floor = max((_FLOORS.get(dtype, torch.finfo(dtype).eps / 2) for dtype in floats), default=0.0)
    ceiling = max((torch.finfo(dtype).eps ** _MAX_LOSS for dtype in floats), default=0.0)
    return min(max(PROOF_FACTOR * repeated_error, floor), ceiling)


def ceiling(result: Any) -> float:
    """The relative error beyond which more than the order of summation is different."""
    return _bound(result, float("inf"))


def culprits(
    one: Call, other: Call, axes: CallAxes, traits: set[Trait], pulse: Callable[[], None] = lambda: None
) -> set[Trait]:
    """Which of the traits make a merged forward wrong by themselves.

    Each argument of `other` is put into `one` alone. Never the first one: nothing could merge if that had to be equal.
    """
    suspects = {trait for trait in traits if trait[0] != axes.reference}
    if num_rows(one.tree, axes) != num_rows(other.tree, axes):
        suspects &= {ADAPTERS}
    mixtures = {trait: _with_trait(one, other, trait) for trait in suspects}
    return {trait for trait, mixture in mixtures.items() if _is_wrong_with(one, mixture, axes, trait, pulse)}


def _with_trait(one: Call, other: Call, trait: Trait) -> Call:
    if trait == ADAPTERS:
        return replace(one, adapters=other.adapters)
    path, _ = trait
    args, kwargs = rebuilt(one.tree, lambda at_, value: at(other.tree, path) if at_ == path else value)
    return replace(one, args=args, kwargs=kwargs)


def _is_wrong_with(one: Call, other: Call, axes: CallAxes, trait: Trait, pulse: Callable[[], None]) -> bool:
    calls = [one, other]
    expanded = batch.to_expand(one, axes, {trait})
    mixed = batch.merged_tree(calls, axes, expanded)
    repeated = batch.merged_tree([one, one], axes, expanded)
    values = []
    for call in calls:
        outcome = outcome_of(functools.partial(alone, call), passes=(torch.OutOfMemoryError,))
        if isinstance(outcome, Raised):
            # A model may refuse such a mixture of two calls; that says nothing of merging.
            return False
        values.append(outcome.value)
        pulse()
    has_problem = problem(calls, axes, values, mixed, repeated, pulse) is not None
    pulse()
    return has_problem
