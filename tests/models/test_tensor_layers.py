"""Layers of which ranks have parts."""

from typing import Any

import pytest
import torch
from torch import nn

from models.teams import each, teams
from sgld.errors import PipelineFailed
from sgld.models.tensor_layers import (
    Cut,
    JoinedLinear,
    Parted,
    SummedEmbedding,
    SummedLinear,
    Team,
    divide,
    in_parts,
    team_of,
)


def parts_of(make: Any, kind: type[Parted], dim: int, size: int) -> tuple[Any, list[Any]]:
    """A layer, and its parts on each of so many ranks."""
    whole = make()
    cut = Cut(dim, (whole.weight.shape[dim],))
    cuts = {"weight": cut} | ({"bias": cut} if kind is JoinedLinear else {})
    parts: list[Any] = []
    for team in teams(size):
        part = make()
        divide(part, kind, cuts, team)
        for name, weight in whole.named_parameters():
            own = cuts[name].part(weight, team.index, size) if name in cuts else weight
            part.register_parameter(name, nn.Parameter(own.detach()))
        parts.append(part)
    return whole, parts


class Scaled(nn.Embedding):
    """As Gemma has it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's own name
        return super().forward(input) * 3


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("make", "kind", "dim", "x"),
    [
        (lambda: nn.Linear(7, 5), SummedLinear, 1, None),
        (lambda: nn.Linear(6, 10), JoinedLinear, 0, torch.randn(2, 3, 6)),
        (lambda: nn.Embedding(10, 4), SummedEmbedding, 0, torch.arange(10).reshape(2, 5)),
        (lambda: nn.Embedding(10, 4, padding_idx=9), SummedEmbedding, 0, torch.arange(10).reshape(2, 5)),
        (lambda: Scaled(10, 4), SummedEmbedding, 0, torch.arange(10).reshape(2, 5)),
    ],
    ids=["summed", "joined", "embedding", "with padding", "scaled embedding"],
)
@torch.no_grad()
def test_parts_make_the_whole(make: Any, kind: type[Parted], dim: int, x: torch.Tensor | None, size: int) -> None:
    whole, parts = parts_of(make, kind, dim, size)
    if x is None:
        # A summed layer gets its part of what the layer before made.
        wide = torch.randn(2, 7)
        inputs = [wide[:, part.place] for part in parts]
        expected = whole(wide)
    else:
        inputs, expected = [x] * size, whole(x)
    for found in each([lambda part=part, own=own: part(own) for part, own in zip(parts, inputs, strict=True)]):  # type: ignore[misc]
        torch.testing.assert_close(found, expected)


def test_layer_that_is_called_without_the_other_ranks_does_not_wait_for_them() -> None:
    layer = nn.Linear(4, 4)
    divide(layer, SummedLinear, {"weight": Cut(1, (4,))}, Team(0, 2))
    with pytest.raises(PipelineFailed, match="calls a layer of which each GPU has a part by itself"):
        layer(torch.zeros(1, 2))


def test_how_much_is_here_is_told() -> None:
    model = nn.Sequential(*(nn.Linear(5000, 10000, bias=False, device="meta") for _ in range(2)))
    assert team_of(model) is None
    team = Team(0, 4)
    divide(model[0], SummedLinear, {"weight": Cut(1, (5000,))}, team)
    assert team_of(model) is team
    assert in_parts(model) == "0.2 of 0.4 GB on each"
