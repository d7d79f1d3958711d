"""Pixels from a rank to the front process, through shared memory.

The memory is a memfd: one state byte per slot, then the slots. An eventfd counts the free slots. Neither has a name,
so nothing is left behind when processes are killed, and /dev/shm (64 MiB in a container) isn't used. Pages cost
memory only once they are written.

The writer marks slots as used and says in a message which ones (`TensorRef`); the reader marks them as free. Each byte
thus has one process that may change it at a time, and the system calls in between order the accesses.
"""

import mmap
import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from multiprocessing.context import assert_spawning
from multiprocessing.reduction import DupFd
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from sgld.errors import Cancelled, ChannelClosed
from sgld.messages import TensorRef
from sgld.outcome import on_failure

if TYPE_CHECKING:
    import torch

DEFAULT_NUM_SLOTS = 16
DEFAULT_SLOT_BYTES = 8 * 1024 * 1024
_FREE, _USED = 0, 1
_CLOSED = "the tensor queue was closed"
# How long a waiting writer may overlook that it should stop.
_STOP_POLL_S = 0.1


@dataclass(frozen=True)
class TensorQueueStatistics:
    """How full the queue is."""

    num_slots: int
    num_free: int
    slot_bytes: int


class _Slots:
    """One process's hold on the shared memory and on the count of free slots."""

    def __init__(self, memory_fd: int, free_fd: int, num_slots: int, slot_bytes: int) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.free_fd = free_fd
        self.memory_fd = memory_fd
        header_bytes = _header_bytes(num_slots)
        # Arrays made from the mapping keep it alive: it goes when the last of them does, even after `close`.
        memory = np.frombuffer(mmap.mmap(memory_fd, header_bytes + num_slots * slot_bytes), np.uint8)
        self.states = memory[:num_slots]
        self.data = memory[header_bytes:]

    @classmethod
    def create(cls, num_slots: int, slot_bytes: int) -> Self:
        memory_fd = os.memfd_create("sgld-tensor-queue")
        os.ftruncate(memory_fd, _header_bytes(num_slots) + num_slots * slot_bytes)
        free_fd = os.eventfd(num_slots, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return cls(memory_fd, free_fd, num_slots, slot_bytes)

    def duplicate(self) -> "_Slots":
        return _Slots(os.dup(self.memory_fd), os.dup(self.free_fd), self.num_slots, self.slot_bytes)

    def runs(self, slots: tuple[int, ...], num_bytes: int) -> list[NDArray[np.uint8]]:
        """The memory of a tensor of `num_bytes`: one flat array for each run of consecutive slots."""
        runs = []
        for first, count in _runs(slots):
            size = min(count * self.slot_bytes, num_bytes)
            runs.append(self.data[first * self.slot_bytes :][:size])
            num_bytes -= size
        return runs

    def free(self, slots: tuple[int, ...]) -> None:
        """Give used slots back and wake a writer."""
        assert len(set(slots)) == len(slots), slots
        assert all(self.states[slot] == _USED for slot in slots), f"slots {slots} aren't all in use"
        for slot in slots:
            self.states[slot] = _FREE
        if slots:
            os.eventfd_write(self.free_fd, len(slots))

    def close(self) -> None:
        os.close(self.memory_fd)
        os.close(self.free_fd)


class TensorWriter:
    """The rank's side: any thread may put.

    It can be pickled only as an argument of a process that is being spawned. One process writes; its copy in the
    process that started it should be closed.
    """

    def __init__(self, slots: _Slots) -> None:
        self._slots: _Slots | None = slots
        # Held while slots are collected one by one: two writers that each hold some would wait for one another.
        self._collecting = threading.Lock()
        self._pinned_address: int | None = None

    @property
    def max_bytes(self) -> int:
        """The size of the largest tensor: half of the slots, so that one can be read while the next is written."""
        slots = self._opened()
        return max(1, slots.num_slots // 2) * slots.slot_bytes

    def put(
        self, pixels: "NDArray[np.uint8] | torch.Tensor", *, should_stop: Callable[[], bool] = lambda: False
    ) -> TensorRef:
        """Copy a tensor into free slots; waits while there are too few (the reader is behind).

        :param pixels: uint8, any shape of at most `max_bytes`; a tensor on a GPU is copied straight into the slots.
        :param should_stop: asked about every 0.1 s while waiting, e.g. the `is_set` of an event.
        :raises ValueError: it is too large, or not of uint8.
        :raises Cancelled: `should_stop` said so.
        :raises ChannelClosed: this side was closed.
        """
        slots = self._opened()
        shape = tuple(pixels.shape)
        num_bytes = self._checked_size(str(pixels.dtype), shape)
        ref = TensorRef(slots=self._acquire(-(-num_bytes // slots.slot_bytes), should_stop), shape=shape)
        with on_failure(lambda: slots.free(ref.slots)):
            _copy(pixels, slots.runs(ref.slots, num_bytes))
        return ref

    def pin(self) -> bool:
        """Page-lock the memory for the GPU; whether that was done (without CUDA nothing happens).

        It touches every page, so the whole queue costs memory from then on. On an H100 it took 47 ms for 128 MiB; a
        copy of 49 MiB from the device then takes 1.3 ms instead of 4.2, and the first one 1.3 instead of 53.

        :raises RuntimeError: CUDA refused.
        """
        import torch

        if not torch.cuda.is_available():
            return False
        data = self._opened().data
        torch.cuda.check_error(int(_cuda_runtime().cudaHostRegister(data.ctypes.data, data.nbytes, 0)))
        self._pinned_address = data.ctypes.data
        return True

    def close(self) -> None:
        """Let go of the memory; no thread puts any more."""
        if self._slots is None:
            return
        if self._pinned_address is not None:
            import torch

            torch.cuda.check_error(int(_cuda_runtime().cudaHostUnregister(self._pinned_address)))
        self._slots.close()
        self._slots = None

    def _opened(self) -> _Slots:
        if self._slots is None:
            raise ChannelClosed(_CLOSED)
        return self._slots

    def _checked_size(self, dtype: str, shape: tuple[int, ...]) -> int:
        """The size in bytes, from "uint8" or "torch.uint8" and a shape."""
        if dtype.removeprefix("torch.") != "uint8":
            raise ValueError(f"the tensor queue takes uint8, got {dtype}; convert it first")
        num_bytes = prod(shape)
        if num_bytes > self.max_bytes:
            raise ValueError(
                f"a tensor of {num_bytes} bytes, shape {shape}, is over the tensor queue's limit of {self.max_bytes} "
                "bytes; split it along its first axis"
            )
        return num_bytes

    def _acquire(self, count: int, should_stop: Callable[[], bool]) -> tuple[int, ...]:
        """Mark `count` free slots as used; raises what `put` does."""
        slots = self._opened()
        _wait_for(lambda wait_s: self._collecting.acquire(timeout=wait_s), should_stop)
        num_taken = 0
        try:
            while num_taken < count:
                _wait_for(lambda wait_s: _take_one(slots.free_fd, wait_s), should_stop)
                num_taken += 1
            chosen = _choose(np.flatnonzero(slots.states == _FREE), count)
            slots.states[list(chosen)] = _USED
            num_taken = 0
        finally:
            if num_taken:
                os.eventfd_write(slots.free_fd, num_taken)
            self._collecting.release()
        return chosen

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        assert_spawning(self)
        slots = self._opened()
        return _rebuild_writer, (DupFd(slots.memory_fd), DupFd(slots.free_fd), slots.num_slots, slots.slot_bytes)


class TensorReader:
    """The front's side; any thread may view and release."""

    def __init__(self, slots: _Slots) -> None:
        self._slots: _Slots | None = slots
        # A thread that encodes pixels may release them while the event loop closes the queue.
        self._lock = threading.Lock()

    def view(self, ref: TensorRef) -> NDArray[np.uint8]:
        """The tensor, read-only, valid until `release`; without a copy if its slots are consecutive.

        :raises ChannelClosed: the queue was closed.
        """
        with self._lock:
            if self._slots is None:
                raise ChannelClosed(_CLOSED)
            runs = self._slots.runs(ref.slots, prod(ref.shape))
        flat = runs[0] if len(runs) == 1 else np.concatenate([np.empty(0, np.uint8), *runs])
        pixels = flat.reshape(ref.shape)
        pixels.flags.writeable = False
        return pixels

    def release(self, ref: TensorRef) -> None:
        """Give the slots of a tensor back to the writer; nothing happens if the queue was closed meanwhile."""
        with self._lock:
            if self._slots is not None:
                self._slots.free(ref.slots)

    @contextmanager
    def borrowed(self, ref: TensorRef) -> Iterator[NDArray[np.uint8]]:
        """`view` for the length of a with block, then `release`."""
        try:
            yield self.view(ref)
        finally:
            self.release(ref)

    def statistics(self) -> TensorQueueStatistics:
        """How full the queue is.

        :raises ChannelClosed: the queue was closed.
        """
        with self._lock:
            if self._slots is None:
                raise ChannelClosed(_CLOSED)
            num_free = int(np.count_nonzero(self._slots.states == _FREE))
            return TensorQueueStatistics(self._slots.num_slots, num_free, self._slots.slot_bytes)

    def close(self) -> None:
        """Let go of the memory; views that are still in use stay valid."""
        with self._lock:
            if self._slots is not None:
                self._slots.close()
            self._slots = None


def tensor_queue(
    *, num_slots: int = DEFAULT_NUM_SLOTS, slot_bytes: int = DEFAULT_SLOT_BYTES
) -> tuple[TensorReader, TensorWriter]:
    """A new queue: the front's side and the rank's."""
    slots = _Slots.create(num_slots, slot_bytes)
    return TensorReader(slots), TensorWriter(slots.duplicate())


def _rebuild_writer(memory: Any, free: Any, num_slots: int, slot_bytes: int) -> TensorWriter:
    return TensorWriter(_Slots(memory.detach(), free.detach(), num_slots, slot_bytes))


def _cuda_runtime() -> Any:
    import torch

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _header_bytes(num_slots: int) -> int:
    """The size of the state bytes, rounded up so that the slots begin on a page."""
    return -(-num_slots // mmap.PAGESIZE) * mmap.PAGESIZE


def _wait_for(attempt: Callable[[float], bool], should_stop: Callable[[], bool]) -> None:
    """Call `attempt(wait_s)` until it is True.

    :raises Cancelled: `should_stop` said so.
    """
    wait_s = 0.0
    while not attempt(wait_s):
        if should_stop():
            raise Cancelled
        wait_s = _STOP_POLL_S


def _take_one(free_fd: int, wait_s: float) -> bool:
    """Take one from the count of free slots, waiting for it for `wait_s`; whether there was one."""
    poll = select.poll()
    poll.register(free_fd, select.POLLIN)
    poll.poll(wait_s * 1000)
    with suppress(BlockingIOError):
        os.eventfd_read(free_fd)
        return True
    return False


def _choose(free: NDArray[np.intp], count: int) -> tuple[int, ...]:
    """`count` of the free slots (ascending): consecutive ones if there are, else the first ones."""
    for start in range(len(free) - count + 1):
        if count and free[start + count - 1] - free[start] == count - 1:
            return tuple(free[start : start + count].tolist())
    return tuple(free[:count].tolist())


def _runs(slots: tuple[int, ...]) -> list[tuple[int, int]]:
    """(first, count) of each run of consecutive slots, in their order."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and slot == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((slot, 1))
    return runs


def _copy(pixels: "NDArray[np.uint8] | torch.Tensor", runs: list[NDArray[np.uint8]]) -> None:
    """Copy a tensor in C order into flat arrays, one after the other."""
    flat = pixels.reshape(-1)
    start = 0
    for run in runs:
        part = flat[start : start + len(run)]
        if isinstance(part, np.ndarray):
            run[:] = part
        else:
            import torch

            # Waits for the device, so that the message that follows isn't ahead of the pixels.
            torch.from_numpy(run).copy_(part)
        start += len(run)
