"""Outputs of a denoiser extrapolated from earlier ones of the same request.

Source: Liu et al., From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers (arXiv 2503.06923), for
the output of the whole model, as the lite mode of diffusers' hooks/taylorseer_cache.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sgld.worker.axes import is_constant
from sgld.worker.sites import Site
from sgld.worker.trees import Path, leaves, rebuilt

Factors = list[dict[Path, torch.Tensor]]
"""Of a Taylor expansion, by order: the last output, then its differences."""


@dataclass(eq=False)
class TaylorSite(Site):
    """A site whose calls are extrapolated; it keeps at most `order` + 1 outputs."""

    order: int = 1
    factors: Factors = field(default_factory=list)
    outline: Any = None
    """The last result that was computed, without its tensors."""

    @property
    def is_hopeless(self) -> bool:
        """A call was computed, and returned what can't be extrapolated."""
        return self.num_calls > 0 and not self.factors

    def note(self, value: Any) -> None:
        """A call was computed and returned this; the pipeline may write to it later."""
        nodes = dict(leaves(value))
        tensors = {path: leaf for path, leaf in nodes.items() if isinstance(leaf, torch.Tensor)}
        others = [leaf for path, leaf in nodes.items() if path not in tensors]
        if all(map(is_constant, others)) and all(tensor.is_floating_point() for tensor in tensors.values()):
            self.factors = updated(self.factors, tensors, self.num_since + 1, self.order)
            self.outline = rebuilt(value, lambda _path, leaf: None if isinstance(leaf, torch.Tensor) else leaf)
        self.computed()

    def predicted(self) -> Any:
        """The result of a call that is skipped."""
        self.skipped()
        values = extrapolated(self.factors, self.num_since)
        return rebuilt(self.outline, lambda path, node: values.get(path, node))


@torch.no_grad()
def updated(factors: Factors, tensors: dict[Path, torch.Tensor], distance: int, order: int) -> Factors:
    """The expansion around the step that was computed now.

    :param factors: the expansion around the one before.
    :param tensors: the output, of any shapes.
    :param distance: steps between the two.
    :param order: the highest order that is kept.

    Source: equation 5 of the paper.
    """
    made: Factors = [{path: tensor.clone() for path, tensor in tensors.items()}]
    for before in factors[:order]:
        last = made[-1]
        made.append({p: ((last[p].float() - before[p].float()) / distance).to(last[p].dtype) for p in last})
    return made


@torch.no_grad()
def extrapolated(factors: Sequence[dict[Path, torch.Tensor]], distance: int) -> dict[Path, torch.Tensor]:
    """The output `distance` steps after the last computed one: the sum over i of factor_i distance^i / i!.

    Source: equation 4 of the paper.
    """
    made = {}
    for path, tensor in factors[0].items():
        terms = [factor[path].float() * (distance**i / math.factorial(i)) for i, factor in enumerate(factors)]
        made[path] = torch.stack(terms).sum(0).to(tensor.dtype)
    return made
