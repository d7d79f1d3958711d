"""Memory that GPUs have in common: each has a room, into which all others write."""

import ctypes
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed import _symmetric_memory as symmetric_memory

from sgld.models.exchange import on_any_rank

_ALIGNED_BYTES = 256
# So many elements of two bytes are written at once.
_MAX_UNIT = 8
# CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED of CUDA's driver API.
_NATIVE_ATOMIC_SUPPORTED = 3


class Rows(NamedTuple):
    """What one rank gets of a tensor, in elements.

    :ivar source: where the first row is in each batch.
    :ivar target: where it goes in that of the other.
    :ivar batch: so far apart batches are there.
    """

    num: int
    source: int
    target: int
    batch: int


def rows_by_heads(index: int, lengths: Sequence[int], heads: range, num_own: int, width: int) -> list[Rows]:
    """Own tokens (B, S, H, D) for (B, all S, `heads` of H, D) of each rank.

    :param heads: some of those that each rank has.
    :param num_own: so many each rank has.
    :param width: of a head.
    """
    columns = len(heads) * width
    target, batch = sum(lengths[:index]) * columns, sum(lengths) * columns
    return [Rows(lengths[index], (rank * num_own + heads.start) * width, target, batch) for rank in range(len(lengths))]


def rows_by_tokens(index: int, lengths: Sequence[int], heads: range, num_own: int, width: int, row: int) -> list[Rows]:
    """Some of own heads (B, all S, `heads` of H, D) for (B, S, H, D) of each rank.

    :param row: so far apart tokens are.
    """
    target, columns = (index * num_own + heads.start) * width, len(lengths) * num_own * width
    return [Rows(num, sum(lengths[:rank]) * row, target, num * columns) for rank, num in enumerate(lengths)]


class Room:
    """Memory of this GPU that others write into. It grows; graphs know it, so all that it was stays.

    :param group: the ranks.
    :param index: of this one.
    :ivar num_meetings: of ranks, but for those that are in graphs.
    """

    def __init__(self, group: Any, index: int, num: int, device: torch.device) -> None:
        self._group, self._index, self._num, self._device = group, index, num, device
        self.num_meetings = 0
        self._kept: list[Any] = []
        self._plans: dict[tuple[Rows, ...], torch.Tensor] = {}
        self._grow(_ALIGNED_BYTES)

    def _grow(self, num_bytes: int) -> None:
        """All ranks do, at the same time.

        :raises torch.OutOfMemoryError: one of them hasn't the memory; on all ranks.
        """
        memory = self._allocated(num_bytes)
        # Torch clears it when it comes to that, and nobody may write before.
        torch.cuda.synchronize(self._device)
        self._memory = memory
        self._handle = symmetric_memory.rendezvous(self._memory, self._group)
        self._addresses = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=self._device)
        self._kept.append((self._memory, self._handle, self._addresses))
        self._taken = 0

    def _allocated(self, num_bytes: int) -> torch.Tensor:
        # Torch's cache has memory that the driver lacks.
        torch.cuda.empty_cache()
        memory, problem = None, "another rank says so"
        try:
            memory = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=self._device)
        except RuntimeError as error:
            problem = str(error)
        if on_any_rank(memory is None, self._num, self._group) or memory is None:
            raise torch.OutOfMemoryError(f"no {num_bytes} bytes for heads that other GPUs write: {problem}")
        return memory

    def clear(self) -> None:
        """What is there isn't needed any longer."""
        self._taken = 0

    def take(self, sizes: Sequence[int]) -> list[int]:
        """Where so many bytes each have place, in the rooms of all ranks alike."""
        places = [-(-size // _ALIGNED_BYTES) * _ALIGNED_BYTES for size in sizes]
        if self._taken + sum(places) > self._memory.numel():
            self._grow(max(sum(places), 2 * self._memory.numel()))
        starts = list(itertools.accumulate(places, initial=self._taken))
        self._taken = starts.pop()
        return starts

    def view(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """What is there until others write over it."""
        return self._memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)

    def meet(self) -> None:
        """Go on when all ranks are here, and what they wrote before has come."""
        self._handle.barrier()
        self.num_meetings += not torch.cuda.is_current_stream_capturing()

    def write(
        self, tensors: Sequence[torch.Tensor], plan: Sequence[Rows], starts: Sequence[int], columns: int, row: int
    ) -> None:
        """Write rows into the rooms of all ranks.

        :param tensors: one to three that are alike, (B, S, ...).
        :param starts: where they go, in bytes; equally far apart.
        :param columns: so many elements of each row.
        :param row: so far apart rows are there, in elements.
        """
        from sgld.models.peer_kernels import COLUMNS, PROGRAMS, ROWS, WARPS, put

        first, num_rows = tensors[0], tensors[0].shape[0]
        tiles = -(-max(rows.num for rows in plan) // ROWS) * -(-columns // COLUMNS)
        start, after = starts[0] // first.itemsize, starts[-1] // first.itemsize
        between = (after - start) // max(len(tensors) - 1, 1)
        unit = math.gcd(_MAX_UNIT, columns, row, *(num for rows in plan for num in rows[1:]))
        num_all = self._num * tiles * len(tensors) * num_rows
        put[(min(num_all, PROGRAMS),)](
            first, tensors[len(tensors) // 2], tensors[-1], self._on_device(tuple(plan)), self._addresses, start,
            num_rows, first.stride(0), first.stride(1), between, row, columns, self._num, self._index, tiles, num_all,
            UNIT=unit, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip

    def _on_device(self, plan: tuple[Rows, ...]) -> torch.Tensor:
        known = self._plans.get(plan)
        if known is None:
            known = torch.tensor(plan, dtype=torch.int64, device=self._device)
            self._plans[plan] = known
        return known


def has_atomics(own: int, other: int) -> bool:
    """Whether a GPU can change a number in the memory of another one in one step: over NVLink, and not over PCIe.

    :raises OSError: there is no driver of CUDA's.
    """
    driver, value = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    handles = [ctypes.c_int(), ctypes.c_int()]
    failed = [driver.cuDeviceGet(ctypes.byref(handle), n) for handle, n in zip(handles, (own, other), strict=True)]
    failed.append(driver.cuDeviceGetP2PAttribute(ctypes.byref(value), _NATIVE_ATOMIC_SUPPORTED, *handles))
    return not any(failed) and bool(value.value)
