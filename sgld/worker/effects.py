"""What a forward does beside computing its result: a graph wouldn't do it again."""

from collections.abc import Sequence

import torch

from sgld.worker.invocation import Tree
from sgld.worker.randomness import default_states
from sgld.worker.recorder import Unfit
from sgld.worker.trees import values


class Effects:
    """What a forward does beside computing its result, from now on."""

    def __init__(self, tree: Tree, tensors: Sequence[torch.Tensor]) -> None:
        self.tree, self.tensors = tree, tensors
        self._given = [leaf for leaf in values(tree) if isinstance(leaf, torch.Generator)]
        self._random, self._versions = self._states(), _versions(tensors)

    def check(self) -> None:
        """See that there was nothing.

        :raises Unfit: a replay wouldn't do the same.
        """
        if _versions(self.tensors) != self._versions:
            raise Unfit("it writes to its arguments")
        if any(not torch.equal(*pair) for pair in zip(self._states(), self._random, strict=True)):
            raise Unfit("it draws random numbers")

    def _states(self) -> list[torch.Tensor]:
        return [*default_states(), *(generator.get_state() for generator in self._given)]


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Which change with each write."""
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
