"""Rows of a forward in parts."""

import torch

from sgld.worker.axes import Batched, CallAxes
from sgld.worker.rows import completed, joined, part, row_axes

LATENTS, TIMESTEP, PAIRS = (1, "latents"), (1, "timestep"), (1, "pairs")
AXES = CallAxes({LATENTS: Batched(0, 2), PAIRS: Batched(1, 4)}, None)


def tree_of(rows: int, timestep: torch.Tensor) -> tuple[tuple[()], dict[str, torch.Tensor]]:
    latents, pairs = torch.arange(rows * 3.0).reshape(rows, 3), torch.arange(rows * 2.0).reshape(1, 2 * rows)
    return (), {"latents": latents, "timestep": timestep, "pairs": pairs, "shared": torch.ones(3)}


def test_parts_make_the_whole_again() -> None:
    given = tree_of(2, torch.tensor([7.0]))
    tree = tree_of(4, torch.arange(4.0))
    found = completed(row_axes(AXES, given, tree), tree[1]["latents"])
    assert found is not None
    bounds = found.parts(2)
    assert bounds == [(0, 2), (2, 4)]
    _, second = part(tree, found, *bounds[1])
    assert second["timestep"].tolist() == [2.0, 3.0]
    assert second["pairs"].tolist() == [[4.0, 5.0, 6.0, 7.0]]
    assert len(second["shared"]) == 3
    results = [part(tree, found, *bound)[1]["latents"] * 2 for bound in bounds]
    assert torch.equal(joined(results, found), tree[1]["latents"] * 2)


def test_one_row_has_no_parts() -> None:
    axes = CallAxes({LATENTS: Batched(0, 1)}, None)
    tree = tree_of(1, torch.tensor([7.0]))
    assert row_axes(axes, tree, tree).parts(2) is None


def test_arguments_that_cannot_be_halved_are_not() -> None:
    axes = CallAxes({LATENTS: Batched(0, 2), PAIRS: Batched(1, 1)}, None)
    tree = ((), {"latents": torch.ones(2, 3), "pairs": torch.ones(1, 1)})
    assert row_axes(axes, tree, tree).parts(2) is None
