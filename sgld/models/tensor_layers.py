"""Layers of which each rank of a team has a part, and what the ranks exchange in them."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from sgld.errors import PipelineFailed
from sgld.models.lora import LoraLayer


class Slice(Protocol):
    """A tensor, or one in a file of safetensors: what is asked for is read."""

    def __getitem__(self, index: Any) -> Tensor: ...


@dataclass(frozen=True)
class Cut:
    """How a weight is divided among ranks: along `dim`, each of the blocks there by itself."""

    dim: int
    blocks: tuple[int, ...]

    def part(self, whole: Slice, index: int, size: int) -> Tensor:
        """What the rank `index` of `size` has of a weight."""
        parts = [whole[(slice(None),) * self.dim + (place,)] for place in self.places(index, size)]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=self.dim)

    def places(self, index: int, size: int) -> list[slice]:
        """Where that is along `dim`; parts may differ by one."""
        starts = itertools.accumulate(self.blocks, initial=0)
        return [
            slice(start + block * index // size, start + block * (index + 1) // size)
            for start, block in zip(starts, self.blocks, strict=False)
        ]

    def shape(self, whole: torch.Size, index: int, size: int) -> tuple[int, ...]:
        """The shape of that."""
        length = sum(place.stop - place.start for place in self.places(index, size))
        return (*whole[: self.dim], length, *whole[self.dim + 1 :])


class Team:
    """The ranks that have the parts of a component.

    They exchange tensors only while all of them run the same forward: a rank that waits for others that aren't there
    would wait for ever.
    """

    def __init__(self, index: int, size: int) -> None:
        self.index, self.size = index, size
        self._group: Any = None
        self._is_together = False

    def meet(self, group: Any) -> None:
        """From now on the ranks have a process group."""
        self._group = group

    @contextmanager
    def together(self) -> Iterator[None]:
        """While the block runs all ranks of the team run the same."""
        self._is_together = True
        try:
            yield
        finally:
            self._is_together = False

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all ranks, on each of them, in the place of this one.

        :raises PipelineFailed: the others aren't there.
        """
        self._exchange(tensor)
        return tensor

    # Compiled code would need the group where it is compiled; so it goes around what is exchanged.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _exchange(self, tensor: Tensor) -> None:
        if not self._is_together:
            raise PipelineFailed(
                "the pipeline calls a layer of which each GPU has a part by itself, without its model; serve it without"
                " --tp-size"
            )
        dist.all_reduce(tensor, group=self._group)


class Parted:
    """A layer with a part of its weights; what it says of its sizes is that of the whole layer."""

    team: Team
    cuts: dict[str, Cut]

    @property
    def place(self) -> slice:
        """Where this rank's part is in the whole."""
        [place] = self.cuts["weight"].places(self.team.index, self.team.size)
        return place


class SplitLinear(Parted, nn.Linear):
    """Has a part of the outputs."""


class JoinedLinear(Parted, nn.Linear):
    """Computes a part of the outputs, and has all of them in the end."""

    def forward(self, x: Tensor) -> Tensor:
        part = super().forward(x)
        whole = part.new_zeros(*part.shape[:-1], self.out_features)
        whole[..., self.place] = part
        return self.team.sum(whole)


class SummedLinear(Parted, nn.Linear):
    """Gets a part of the inputs, and has the sum over all parts in the end; the bias is whole."""

    def forward(self, x: Tensor) -> Tensor:
        result = self.team.sum(functional.linear(x, self.weight))
        return result if self.bias is None else result + self.bias


class SplitEmbedding(Parted, nn.Embedding):
    """Has a part of each vector."""


class SummedEmbedding(Parted, nn.Embedding):
    """Has the vectors of a part of the vocabulary; the others come from the ranks that have them."""

    def forward(self, x: Tensor) -> Tensor:
        start, stop = self.place.start, self.place.stop
        is_here = (x >= start) & (x < stop)
        return self.team.sum(super().forward((x - start).clamp(0, stop - start - 1)) * is_here[..., None])


def divide(module: nn.Module, kind: type[Parted], cuts: dict[str, Cut], team: Team) -> None:
    """Make a layer on the meta device one with a part of its weights, in place: what refers to it still does."""
    own = type(module)
    base = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
    # Some embeddings are more than torch's: scaled, for one.
    module.__class__ = kind if own is base else type(own.__name__, (kind, own), {})
    parted: Any = module
    parted.team, parted.cuts = team, cuts
    if isinstance(module, nn.Embedding):
        # It is of the whole vocabulary, and only means that this vector isn't trained.
        parted.padding_idx = None
    for name, cut in cuts.items():
        whole = getattr(module, name)
        part = torch.empty(cut.shape(whole.shape, team.index, team.size), dtype=whole.dtype, device=whole.device)
        setattr(module, name, nn.Parameter(part, requires_grad=False))


def part_of(module: nn.Module, change: LoraLayer) -> LoraLayer:
    """What an adapter does to the part of a layer that is here."""
    if not isinstance(module, SplitLinear | SummedLinear):
        return change
    cut, team = module.cuts["weight"], (module.team.index, module.team.size)
    if isinstance(module, SummedLinear):
        return replace(change, down=cut.part(change.down, *team))
    bias = cut.part(change.bias, *team) if change.bias is not None else None
    return replace(change, up=cut.part(change.up, *team), bias=bias)


def team_of(component: nn.Module) -> Team | None:
    """The team that has the parts of a component; None: it is whole."""
    return next((part.team for part in component.modules() if isinstance(part, Parted)), None)


def in_parts(component: nn.Module) -> str:
    """How much of a component is here, for people."""
    here, whole = sizes(component)
    return f"{here / 1e9:.1f} of {whole / 1e9:.1f} GB on each"


def sizes(component: nn.Module) -> tuple[int, int]:
    """The bytes of the weights that are here, and of the whole component."""
    wholes = {
        id(weight): _whole_bytes(module, leaf, weight)
        for module in component.modules()
        for leaf, weight in module.named_parameters(recurse=False)
    }
    return sum(weight.nbytes for weight in component.parameters()), sum(wholes.values())


def _whole_bytes(module: nn.Module, leaf: str, weight: Tensor) -> int:
    cut = module.cuts.get(leaf) if isinstance(module, Parted) else None
    return weight.nbytes if cut is None else weight.nbytes * sum(cut.blocks) // weight.shape[cut.dim]
