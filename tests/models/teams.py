"""Ranks that have parts of a model, as threads of this process."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sgld.models.tensor_layers import Team

WAIT_S = 20.0


class ThreadTeam(Team):
    """One of several that meet in memory."""

    def __init__(self, index: int, size: int, places: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(index, size)
        self._places, self._barrier = places, barrier

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self._places[self.index] = tensor
        self._barrier.wait(WAIT_S)
        total = torch.stack(self._places).sum(0)
        self._barrier.wait(WAIT_S)
        return total


def teams(size: int) -> list[ThreadTeam]:
    places, barrier = [None] * size, threading.Barrier(size)
    return [ThreadTeam(index, size, places, barrier) for index in range(size)]


def each(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the calls return that are made at the same time."""
    results: list[Any] = [None] * len(calls)

    def call(index: int) -> None:
        with torch.no_grad():
            results[index] = calls[index]()

    threads = [threading.Thread(target=call, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_S)
    return results
