"""A component that is to be run: what the executor asks for, the runtime runs, graphs repeat and ranks share."""

import functools
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sgld.worker.rows import RowAxes
from sgld.worker.trees import leaves

if TYPE_CHECKING:
    from sgld.worker.graph_orders import Ordered

Tree = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional arguments and others."""


@dataclass(frozen=True, eq=False)
class Invocation:
    """One invocation of a component, be it for a call or for those of a batch."""

    module: nn.Module
    method: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    """Compute in it, whatever the weights are kept in."""
    is_exact: bool = False
    """Run the kernels that such calls run for the server's life, whatever was compiled meanwhile."""
    fixed: Hashable | None = None
    """What must be equal for two to share a CUDA graph, beside their arguments; None: this can't be one."""
    lends: bool = False
    """The caller copies what it needs of the result before anything else runs."""
    axes: RowAxes | None = None
    """Which arguments count rows, where several ranks may share these."""
    is_shared: bool = False
    """Other ranks wait for this one inside of the forward, so it mustn't begin it once more."""
    ordered: "Ordered | None" = None
    """How rank 0 has all ranks run it, where it may be a CUDA graph."""

    @property
    def tree(self) -> Tree:
        return self.args, self.kwargs

    @functools.cached_property
    def form(self) -> str:
        """Invocations of a component with an equal one are compiled alike."""
        shapes = (f"{path}{tuple(leaf.shape)}" for path, leaf in leaves(self.tree) if isinstance(leaf, torch.Tensor))
        return f"{self.method} {' '.join(shapes)}"

    @functools.cached_property
    def course(self) -> str:
        """Invocations of a component with an equal one go through the same layers in the same order."""
        constants = ((path, leaf) for path, leaf in leaves(self.tree) if isinstance(leaf, int | str))
        return f"{self.form} {' '.join(f'{path}{constant!r}' for path, constant in constants)}"

    def having(self, tree: Tree) -> "Invocation":
        """The same with other arguments."""
        args, kwargs = tree
        return replace(self, args=args, kwargs=kwargs)

    def forward(self, tree: Tree) -> Any:
        """Run the component on a tree of arguments."""
        # Not the method `forward` itself: hooks and compiled code are around it.
        function = self.module if self.method == "forward" else getattr(self.module, self.method)
        return function(*tree[0], **tree[1])

    def plain(self) -> Any:
        """Run the component as it is."""
        return self.forward(self.tree)
