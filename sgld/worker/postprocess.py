"""What happens to frames once a pipeline has made them: others come between them, then they are enlarged.

In the thread of their task, frame by frame. What computes is handed over as calls, like those of a pipeline: a frame or
a tile each, so that nobody waits for more than that.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sgld.errors import InvalidRequest
from sgld.models.filters import Filter, Interpolator, Lanczos, Upscaler
from sgld.models.tiles import Canvas, overlap_of
from sgld.sampling_params import SamplingParams
from sgld.worker.calls import Call, current_context
from sgld.worker.out_of_memory import is_out_of_memory
from sgld.worker.residency import free_bytes
from sgld.worker.runtime import Runtime
from sgld.worker.task import Task

# What a tile may take of the memory that is free, and of time: 1.5e11 multiplications take a CPU with few cores about
# a second, 1e13 in fp16 an H100 0.2 s (RRDB at 832x480: 0.14 s whole, but 0.53 s in tiles of 256).
_SHARE = 0.5
_MAX_WORK = {"cpu": 1.5e11, "cuda": 1e13}
# Of a tile beyond what overlaps: smaller ones would be overlap for the most part.
_MIN_INSIDE = 64


class FilterCall(Call):
    """A call of a filter. It has a runtime of its own: filters stay on their device, and are on rank 0 only."""

    @functools.cached_property
    def cost_key(self) -> str:
        return f"{super().cost_key} {self.module.label}"


class Postprocessing:
    """The filters of one request, in the thread of its task.

    :param runtime: of the pipeline's components: those that are offloaded leave the device when a filter needs it.
    """

    def __init__(
        self,
        task: Task,
        params: SamplingParams,
        filters: tuple[Filter, ...],
        device: torch.device,
        runtime: Runtime,
    ) -> None:
        self._task = task
        self._params = params
        self._interpolator = next((f for f in filters if isinstance(f, Interpolator)), None)
        self._upscaler = next((f for f in filters if not isinstance(f, Interpolator)), None)
        self._device = device
        self._runtime = runtime
        self._num_done = self._num_calls = self._num_between = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done and by what, for people."""
        notes = []
        if self._interpolator is not None and self._num_between:
            notes.append(f"{self._params.frame_factor}x frames by {self._interpolator.label}")
        if self._upscaler is not None:
            notes.append(f"{self._params.size_factor}x size by {self._upscaler.label}")
        return tuple(notes)

    def frames(self, frames: torch.Tensor, *, is_video: bool, max_bytes: int) -> Iterator[torch.Tensor]:
        """What comes of frames, (F, H, W, 3 or 4), uint8: one after the other, (1, H, W, 3 or 4).

        :param max_bytes: that a frame may have.
        :raises InvalidRequest: they would have more.
        :raises OutOfMemoryError: there is no room even for a small tile.
        """
        height, width, channels = frames.shape[1:]
        self.check_size(height, width, channels, max_bytes=max_bytes)
        factor = self._params.frame_factor if is_video and self._interpolator is not None else 1
        self._num_between = num_between = (len(frames) - 1) * (factor - 1)
        num_tiles = len(self._canvas(height, width).tiles) if isinstance(self._upscaler, Upscaler) else 1
        self._num_calls = num_between + (len(frames) + num_between) * num_tiles * (self._upscaler is not None)
        for frame in self._interpolated(frames, factor):
            yield self._enlarged(frame)

    def check_size(self, height: int, width: int, channels: int = 3, *, max_bytes: int) -> None:
        """See that what comes of a frame of this size can be sent.

        :raises InvalidRequest: it has more bytes than that.
        """
        factor = self._params.size_factor
        size_bytes = height * width * channels * factor**2
        if size_bytes > max_bytes:
            what = f"a frame of {width}x{height}, {factor} times as large, takes {size_bytes} bytes"
            message = f"{what}, {max_bytes} is the limit; choose a smaller upscaling_scale or size"
            raise InvalidRequest(message, "upscaling_scale")

    def _interpolated(self, frames: torch.Tensor, factor: int) -> Iterator[torch.Tensor]:
        scale, last = self._params.frame_interpolation_scale, None
        for index in range(len(frames)):
            first, last = last, frames[index : index + 1].to(self._device)
            for step in range(1, factor if first is not None else 1):
                yield self._call("interpolator", self._interpolator, first, last, step / factor, scale)
            yield last

    def _enlarged(self, frame: torch.Tensor) -> torch.Tensor:
        height, width = frame.shape[1:3]
        if self._upscaler is None:
            return frame
        if isinstance(self._upscaler, Lanczos):
            return self._call("upscaler", self._upscaler, frame, self._size_of(height, width))
        while True:
            with contextlib.suppress(torch.OutOfMemoryError):
                return self._in_tiles(self._upscaler, frame)
            self._shrink(self._upscaler, max(height, width))

    def _in_tiles(self, upscaler: Upscaler, frame: torch.Tensor) -> torch.Tensor:
        canvas = self._canvas(*frame.shape[1:3])
        for index in range(len(canvas.tiles)):
            result = self._call("upscaler", upscaler, frame, canvas, index)
        return result

    def _canvas(self, height: int, width: int) -> Canvas:
        upscaler = self._upscaler
        assert isinstance(upscaler, Upscaler), "others have no tiles"
        if upscaler.edge is None:
            upscaler.edge = edge_of(upscaler, self._device)
        return Canvas(
            height,
            width,
            edge=upscaler.edge,
            radius=upscaler.radius,
            multiple=upscaler.multiple,
            scale=upscaler.scale,
            size=self._size_of(height, width),
        )

    def _shrink(self, upscaler: Upscaler, longest_side: int) -> None:
        """Memory was too small for its tiles: from now on they are smaller.

        :raises OutOfMemoryError: they can't be.
        """
        assert upscaler.edge is not None, "it had tiles"
        tried, least = min(upscaler.edge, longest_side), smallest_edge(upscaler)
        if tried <= least:
            raise torch.OutOfMemoryError(f"there is no room for tiles of {tried} pixels")
        upscaler.edge = max(tried // 2, least)

    def _size_of(self, height: int, width: int) -> tuple[int, int]:
        return height * self._params.size_factor, width * self._params.size_factor

    def _call(self, role: str, filter_: Filter | None, *args: Any) -> torch.Tensor:
        assert filter_ is not None, f"there is an {role}"
        with torch.no_grad():
            context = current_context()
        around = functools.partial(_alone, self._runtime, filter_)
        about = self._task.request_id, role, filter_, "decode"

        def work() -> Any:
            return self._task.hand_over(FilterCall(*about, args, {}, context, around=around))

        result = self._with_room(work, filter_)
        self._num_done += 1
        self._task.processed(self._num_done, max(self._num_calls, self._num_done))
        return result  # type: ignore[no-any-return]

    def _with_room(self, work: Callable[[], Any], filter_: Filter) -> Any:
        """Do it; where memory is too small, once more when offloaded components have left the device.

        :raises OutOfMemoryError: it is too small without them, too.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error)
            # Here, where nothing refers to what the failed call allocated.
            if not self._runtime.residency.make_room(filter_):
                raise torch.OutOfMemoryError(problem)


def edge_of(upscaler: Upscaler, device: torch.device) -> int:
    """How long the sides of tiles are: as memory and time allow."""
    free = _free_on_host() if device.type == "cpu" else free_bytes(device)
    by_memory = math.isqrt(int(_SHARE * free / (upscaler.bytes_per_pixel * upscaler.dtype.itemsize)))
    by_work = math.isqrt(int(_MAX_WORK[device.type] / max(upscaler.num_weights, 1)))
    edge = max(min(by_memory, by_work), smallest_edge(upscaler))
    return edge - edge % upscaler.multiple


def smallest_edge(upscaler: Upscaler) -> int:
    """Smaller tiles would be overlap for the most part."""
    return overlap_of(upscaler.radius, upscaler.multiple) + _MIN_INSIDE


@contextlib.contextmanager
def _alone(runtime: Runtime, filter_: Filter) -> Iterator[None]:
    """Around a filter: what isn't needed leaves the device, and the tick is known for one that ran eagerly."""
    runtime.residency.bring(filter_)
    runtime.variant = "eager"
    yield


def _free_on_host() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
