"""The precision in which a component computes, where a pipeline asks for another than that of its weights."""

import contextlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

from sgld.worker.trees import Path, leaves, rebuilt

Autocasts = tuple[tuple[str, torch.dtype], ...]
"""Device type and dtype of each autocast region that is entered."""


def autocasts() -> Autocasts:
    """Those of the calling thread."""
    return tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))


def wanted(method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype that `module.<method>(*args, **kwargs)` casts to; None if it doesn't."""
    named = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}
    dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
    return named.get(method) or next(iter(dtypes), None)


def is_wider(dtype: torch.dtype | None, than: torch.dtype) -> bool:
    """Whether a float dtype takes more bits than another one."""
    return dtype is not None and dtype.is_floating_point and dtype.itemsize > than.itemsize


@contextlib.contextmanager
def computing_in(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Cast the weights of a component while a block runs; the very same ones come back."""
    tensors = chain(module.parameters(), module.buffers()) if dtype is not None else ()
    before = [(tensor, tensor.data) for tensor in tensors if tensor.is_floating_point()]
    try:
        for tensor, weights in before:
            tensor.data = weights.to(dtype)
        yield
    finally:
        for tensor, weights in before:
            tensor.data = weights


def differs(tree: Any, dtype: torch.dtype) -> bool:
    """Whether a component that computes in `dtype` might refuse some of its arguments."""
    return any(_is_other(leaf, dtype) for _, leaf in leaves(tree))


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """Arguments with all that `differs` cast."""

    def own(_path: Path, value: Any) -> Any:
        return value.to(dtype) if _is_other(value, dtype) else value

    return rebuilt(tree, own)


def _is_other(value: Any, dtype: torch.dtype) -> bool:
    # Samples and embeddings; numbers, one for each sample (timesteps, guidance), models cast themselves.
    is_values = isinstance(value, torch.Tensor) and value.ndim > 1 and value.is_floating_point()
    return is_values and value.dtype != dtype
