"""What a task draws from torch's default generators, which belong to the process: each task has a state of its own.

So a pipeline that draws without a generator, and a model that draws inside a forward, get the same numbers in company
as alone.
"""

import contextlib
from collections.abc import Iterator

import torch


class OwnRandom:
    """The states of the default generators as one task sees them.

    :param seed: where they begin.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._states: list[torch.Tensor] = []
        self.num_draws = 0
        """How many blocks drew anything."""

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Draw from here as long as the block lasts."""
        generators = _default_generators()
        outer = [generator.get_state() for generator in generators]
        before = self._states or [_seeded(generator.device, self._seed) for generator in generators]
        for generator, state in zip(generators, before, strict=False):
            generator.set_state(state)
        try:
            yield
        finally:
            self._states = [generator.get_state() for generator in generators]
            pairs = zip(self._states, before, strict=False)
            self.num_draws += any(_bytes(state) != _bytes(known) for state, known in pairs)
            for generator, state in zip(generators, outer, strict=True):
                generator.set_state(state)


def default_states() -> list[torch.Tensor]:
    """The states of the default generators, which are others after something was drawn."""
    return [generator.get_state() for generator in _default_generators()]


def _default_generators() -> list[torch.Generator]:
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.default_generator, *([torch.cuda.default_generators[torch.cuda.current_device()]] if on_gpu else [])]


def _bytes(state: torch.Tensor) -> bytes:
    """Compared in a third of the time that torch takes for 5000 of them, which is done twice in each tick."""
    return state.numpy().tobytes()


def _seeded(device: torch.device, seed: int) -> torch.Tensor:
    return torch.Generator(device).manual_seed(seed).get_state()
