"""Memory that is too small is one error: torch has one for GPUs, and words only for the host."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too small."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


@contextmanager
def one_error() -> Iterator[None]:
    """Around a block or a function: for the host's memory the same error is raised as for a GPU's.

    :raises torch.OutOfMemoryError: memory was too small.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # Not those of compilers, which are of classes of their own: without a compiler the forward may have the memory.
        if type(error) not in (RuntimeError, MemoryError) or not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(str(error)) from None
