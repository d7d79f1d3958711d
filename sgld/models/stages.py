"""What goes on while a model is loaded, for those who wait for it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

_GB = 1e9


class Tell(Protocol):
    """Told what goes on from now on; `at_once`: who waits hears it even if it is over soon."""

    def __call__(self, stage: str, *, at_once: bool = False) -> None: ...


def nobody(stage: str, *, at_once: bool = False) -> None:
    """Nobody waits."""


@contextmanager
def reading(tell: Tell) -> Iterator[None]:
    """While the block runs diffusers' loader tells which component it comes to, and what reading one took.

    Only a process that loads one model may have somebody told: it is done for all threads.
    """
    if tell is nobody:
        yield
        return
    from diffusers.pipelines import pipeline_utils

    original: Callable[..., Any] = pipeline_utils.load_sub_model

    def told(*args: Any, **kwargs: Any) -> Any:
        name = kwargs.get("name", "a component")
        tell(f"reading {name}")
        start = time.monotonic()
        part = original(*args, **kwargs)
        if isinstance(part, nn.Module):
            tell(f"read {name}, {size_gb(part):.1f} GB, in {time.monotonic() - start:.1f} s", at_once=True)
        return part

    pipeline_utils.load_sub_model = told
    try:
        yield
    finally:
        pipeline_utils.load_sub_model = original


def size_gb(module: nn.Module) -> float:
    """The weights of a component, 10^9 bytes."""
    return sum(weight.nbytes for weight in module.parameters()) / _GB
