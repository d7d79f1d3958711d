"""Captures forwards as CUDA graphs, and leaves nothing behind where that fails."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sgld.outcome import Raised, one_line, outcome_of
from sgld.worker.axes import is_constant
from sgld.worker.trees import opened, rebuilt, values

# What torch says of it has numbers that differ each time.
_FULL = "the device is out of memory"
_MAX_CHARS = 200
Forward = Callable[[Any], Any]
"""Runs a component on a tree of arguments."""


class Unfit(Exception):
    """A forward that can't be a graph; the message says why."""


class CaptureFailed(Unfit):
    """A capture failed where an eager forward doesn't."""


class Broken(CaptureFailed):
    """The device cut a capture off; later ones share no memory with those before."""


class Slow(Unfit):
    """A graph wouldn't pay."""


class Full(Unfit):
    """Memory was too short."""


class Leaking(Unfit):
    """A forward keeps tensors that it made; they are in the memory of graphs, which others would write to."""


@dataclass(frozen=True)
class Warmed:
    """An eager forward: its result, when its launches were done, and when the device was."""

    result: Any
    launch_s: float
    total_s: float


class Recording(Protocol):
    """A captured forward. `size_bytes`: what only this one takes; `pool_growth_bytes`: what the pool grew by."""

    size_bytes: int
    pool_growth_bytes: int

    def replay(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The result for these tensors among the arguments, opened; the next replay of any graph writes to it."""
        ...


class Recorder(Protocol):
    """Makes recordings."""

    def warm_up(self, forward: Forward, tree: Any) -> Warmed:
        """Run a forward, so that all it needs for a capture is there."""
        ...

    def record(self, forward: Forward, tree: Any, tensors: Sequence[torch.Tensor]) -> Recording:
        """Capture a forward that was warmed up.

        :raises Unfit: it can't be captured.
        """
        ...

    def timed(self, run: Callable[[], Any]) -> tuple[Any, float]:
        """A result, and the seconds until the device had it."""
        ...

    def renew(self) -> None:
        """There are no graphs any more: the next ones share a pool of their own."""
        ...


class CudaRecorder:
    """Records on a stream of its own, into one pool of memory, in the thread that owns the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.cuda._utils._get_device_index(device, optional=True)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._scratch = torch.zeros(1, device=device)
        self._pool: Any = None
        """None: the next capture begins one."""
        self._anchor: torch.cuda.CUDAGraph | None = None
        self._failed: list[torch.cuda.CUDAGraph] = []
        """Captures that were cut off; torch's allocator of pinned memory goes on asking them."""

    def renew(self) -> None:
        self._pool = self._anchor = None

    def _new_pool(self) -> None:
        """Begin a pool with a graph that stays: without one torch would refuse the pool to later captures."""
        pool, anchor = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        with self._on_stream():
            anchor.capture_begin(pool=pool, capture_error_mode="thread_local")
            self._scratch.zero_()
            anchor.capture_end()
        self._pool, self._anchor = pool, anchor

    def timed(self, run: Callable[[], Any]) -> tuple[Any, float]:
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        result = run()
        torch.cuda.synchronize(self._device)
        return result, time.perf_counter() - start

    def warm_up(self, forward: Forward, tree: Any) -> Warmed:
        # On the stream of captures: libraries take memory for each stream when they are first used there.
        torch.cuda.synchronize(self._device)
        with self._on_stream():
            start = time.perf_counter()
            result = forward(tree)
            launched = time.perf_counter()
            self._stream.synchronize()
            done = time.perf_counter()
        return Warmed(result, launched - start, done - start)

    def record(self, forward: Forward, tree: Any, tensors: Sequence[torch.Tensor]) -> "CudaRecording":
        try:
            inputs = [_static(tensor) for tensor in tensors]
            if self._pool is None:
                self._new_pool()
        except torch.OutOfMemoryError:
            raise Full(_FULL) from None
        except RuntimeError as error:
            raise Unfit(one_line(error)[:_MAX_CHARS]) from None
        own = iter(inputs)
        static = rebuilt(tree, lambda _path, leaf: next(own) if isinstance(leaf, torch.Tensor) else leaf)
        # What eager forwards left in the allocator's cache has no use inside of a capture.
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, (reserved, used) = torch.cuda.mem_get_info(self._device)[0], self._pool_use()
        graph = torch.cuda.CUDAGraph()
        outputs = opened(self._capture(graph, forward, static))
        reserved_now, used_now = self._pool_use()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(outputs)}
        if used_now - used > sum(storages.values()):
            graph.replay()  # what it keeps was never computed
            raise Leaking("it keeps tensors that it makes in a forward")
        growth = reserved_now - reserved
        own_bytes = max(free - torch.cuda.mem_get_info(self._device)[0] - growth, 0) + sum(t.nbytes for t in inputs)
        return CudaRecording(graph, inputs, outputs, own_bytes, growth)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        outer = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                outer.wait_stream(self._stream)

    def _capture(self, graph: torch.cuda.CUDAGraph, forward: Forward, tree: Any) -> Any:
        def captured() -> Any:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            return forward(tree)

        had_gc = gc.isenabled()
        gc.disable()  # what it frees may need calls that a capture forbids
        torch.clear_autocast_cache()
        try:
            with self._on_stream():
                outcome = outcome_of(captured)
                torch.clear_autocast_cache()
                ended = outcome_of(graph.capture_end)
                if isinstance(ended, Raised):
                    self._clean_up(graph)
        finally:
            if had_gc:
                gc.enable()
        if isinstance(outcome, Raised):
            raise _unfit(outcome.error, is_broken=isinstance(ended, Raised))
        if isinstance(ended, Raised):
            raise Broken(one_line(ended.error)[:_MAX_CHARS])
        return outcome.value

    def _clean_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """After a capture that the device cut off torch leaves its allocators and its generators inside of it."""
        self._failed.append(graph)
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device, self._pool)
            torch._C._cuda_releasePool(self._device, self._pool)
        for generator in torch.cuda.default_generators:
            generator.graphsafe_set_state(generator.clone_state())
        # The allocator of pinned memory can't be told: it takes no other capture for the old pool.
        self.renew()

    def _pool_use(self) -> tuple[int, int]:
        """What the pool has of the device's memory, and what of that tensors take, in bytes."""
        segments = torch.cuda.memory.memory_snapshot(self._pool)  # type: ignore[no-untyped-call]
        blocks = [block for segment in segments for block in segment["blocks"]]
        used = sum(block["requested_size"] for block in blocks if block["state"] != "inactive")
        return sum(segment["total_size"] for segment in segments), used


class CudaRecording:
    """A captured forward, with the tensors that it reads and writes."""

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        inputs: Sequence[torch.Tensor],
        outputs: Any,
        size_bytes: int,
        pool_growth_bytes: int,
    ) -> None:
        self.size_bytes = size_bytes
        self.pool_growth_bytes = pool_growth_bytes
        self._graph = graph
        self._inputs = [_distinct(tensor) for tensor in inputs]
        self._outputs = outputs

    def replay(self, tensors: Sequence[torch.Tensor]) -> Any:
        torch._foreach_copy_(self._inputs, [_distinct(tensor) for tensor in tensors], non_blocking=True)
        self._graph.replay()
        return self._outputs


def _static(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that stays where it is, with the values and the strides of this one."""
    static = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    _distinct(static).copy_(_distinct(tensor))
    return static


def _distinct(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor, those once that an expanded one repeats."""
    if 0 in tensor.stride():
        for axis, stride in enumerate(tensor.stride()):
            tensor = tensor.narrow(axis, 0, 1) if stride == 0 else tensor
    return tensor


def check_result(result: Any, device_type: str) -> None:
    """See that a result can be copied out of a graph.

    :raises Unfit: it holds more than tensors and constants.
    """
    for leaf in values(opened(result)):
        if not isinstance(leaf, torch.Tensor) and not is_constant(leaf):
            raise Unfit(f"it returns a {type(leaf).__name__}")
        if isinstance(leaf, torch.Tensor) and leaf.device.type != device_type:
            raise Unfit(f"it returns a tensor on {leaf.device}")


def _unfit(error: BaseException, *, is_broken: bool) -> Unfit:
    """What it means for a capture that a forward raised this; `is_broken`: the capture couldn't be ended either."""
    if isinstance(error, torch.OutOfMemoryError):
        return Full(_FULL)
    kind = type(error) if isinstance(error, Unfit) else CaptureFailed
    return (Broken if is_broken and kind is CaptureFailed else kind)(one_line(error)[:_MAX_CHARS])


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in values(tree) if isinstance(leaf, torch.Tensor)]
