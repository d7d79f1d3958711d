"""Graphs that aren't there: forwards that are run again, on tensors of their own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sgld.worker.recorder import Unfit, Warmed
from sgld.worker.trees import opened, rebuilt


class FakeRecording:
    """Runs the forward again, on tensors of its own."""

    def __init__(self, forward: Callable[[Any], Any], tree: Any, tensors: Sequence[torch.Tensor]) -> None:
        self.size_bytes, self.pool_growth_bytes = 10, 100
        self._inputs = [tensor.clone() for tensor in tensors]
        own = iter(self._inputs)
        self._tree = rebuilt(tree, lambda _path, leaf: next(own) if isinstance(leaf, torch.Tensor) else leaf)
        self._forward = forward

    def replay(self, tensors: Sequence[torch.Tensor]) -> Any:
        for own, tensor in zip(self._inputs, tensors, strict=True):
            own.copy_(tensor)
        return opened(self._forward(rebuilt(self._tree, lambda _path, leaf: leaf)))


class FakeRecorder:
    """Makes such recordings. `seconds`: what is timed takes so long, one after the other; then a second each."""

    def __init__(self) -> None:
        self.launch_s = 1.0
        self.seconds: list[float] = []
        self.problem: Unfit | None = None
        self.num_warmed = self.num_recorded = self.num_renewed = 0

    def warm_up(self, forward: Callable[[Any], Any], tree: Any) -> Warmed:
        self.num_warmed += 1
        return Warmed(forward(tree), self.launch_s, 1.0)

    def record(self, forward: Callable[[Any], Any], tree: Any, tensors: Sequence[torch.Tensor]) -> FakeRecording:
        if self.problem is not None:
            raise self.problem
        self.num_recorded += 1
        return FakeRecording(forward, tree, tensors)

    def timed(self, run: Callable[[], Any]) -> tuple[Any, float]:
        # A replay comes before the eager forward.
        self.seconds = self.seconds or [0.1, 1.0]
        return run(), self.seconds.pop(0)

    def renew(self) -> None:
        self.num_renewed += 1
