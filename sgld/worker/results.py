"""What leaves a rank: control messages at once, pixels and everything after them through a thread of their own.

The thread waits for the device and for the tensor queue, so that neither pixels that are still computed nor a slow
front hold up the executor and the tasks, until `MAX_WAITING` results wait; then the task that has one more waits with
the baton, and the rank stands still.
"""

import queue
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sgld.errors import Cancelled, ChannelClosed, PipelineFailed
from sgld.ipc.channel import RankEnd
from sgld.ipc.tensor_queue import TensorWriter
from sgld.messages import AnyCommand, AnyReply, Decoded, Heard, Previewed, TensorRef
from sgld.outcome import Value, outcome_of

MAX_WAITING = 64
# How long a front that is alive may take to make room for what waits when the rank leaves.
_CLOSE_S = 5.0
Array = torch.Tensor | NDArray[np.uint8]


@dataclass(frozen=True)
class _Parcel:
    """A message that can be made once its pixels are in the tensor queue.

    `is_there`: an event of a GPU, which computes the pixels before it.
    """

    pixels: Array
    message: Callable[[TensorRef], AnyReply]
    is_there: torch.cuda.Event | None


class Results:
    """Sends messages and pixels in the order in which they are given."""

    def __init__(self, channel: RankEnd[AnyReply, AnyCommand], tensors: TensorWriter) -> None:
        self._channel = channel
        self._tensors = tensors
        self._waiting: queue.Queue[_Parcel | AnyReply | None] = queue.Queue(MAX_WAITING)
        self._is_closed = threading.Event()
        self._error: BaseException | None = None
        self._copying: torch.cuda.Stream | None = None
        """Beside the one that computes: copies don't wait for the next forward, nor it for them."""
        self._thread = threading.Thread(target=self._work, name="results", daemon=True)
        self._thread.start()

    @property
    def max_frame_bytes(self) -> int:
        """Of the largest frame that can be sent."""
        return self._tensors.max_bytes

    def preview(self, request_id: str, step: int, picture: Array) -> None:
        """Send a preview, (H, W, 3), uint8."""
        self._put(_parcel(picture, lambda ref: Previewed(request_id=request_id, step=step, pixels=ref)))

    def frames(self, request_id: str, index: int, frames: torch.Tensor, *, is_video: bool) -> None:
        """Send frames, (F, H, W, 3), uint8, in pieces that the tensor queue takes.

        :raises PipelineFailed: it takes no such large frame.
        """
        frame_bytes = frames[0].numel()
        if frame_bytes > self._tensors.max_bytes:
            raise PipelineFailed(
                f"a frame takes {frame_bytes} bytes, {self._tensors.max_bytes} is the limit; ask for a smaller size"
            )
        per_piece = self._tensors.max_bytes // frame_bytes
        for start in range(0, len(frames), per_piece):
            piece, at = frames[start : start + per_piece], index + start
            self._put(
                _parcel(
                    piece,
                    lambda ref, at=at: Decoded(request_id=request_id, index=at, is_video=is_video, pixels=ref),  # type: ignore[misc]
                )
            )

    def audio(self, request_id: str, samples: NDArray[np.float32], sample_rate: int) -> None:
        """Send sound, (channels, samples), in pieces that the tensor queue takes."""
        rows = np.ascontiguousarray(samples.T).view(np.uint8)
        per_piece = max(1, self._tensors.max_bytes // rows.shape[1])

        def message(ref: TensorRef) -> Heard:
            return Heard(request_id=request_id, sample_rate=sample_rate, samples=ref)

        for start in range(0, len(rows), per_piece):
            self._put(_parcel(rows[start : start + per_piece], message))

    def message(self, message: AnyReply) -> None:
        """Send a message after all that was given before."""
        self._put(message)

    def close(self) -> None:
        """Send what waits, unless the front is gone.

        :raises Exception: something can't be sent, so that nothing was since then.
        """
        with suppress(queue.Full):
            self._waiting.put(None, timeout=_CLOSE_S)
            self._thread.join(timeout=_CLOSE_S)
        self._is_closed.set()
        if self._error is not None:
            raise self._error

    def _put(self, item: _Parcel | AnyReply) -> None:
        self._waiting.put(item)

    def _work(self) -> None:
        sent = outcome_of(self._send_all, catches=BaseException)
        if isinstance(sent, Value):
            return
        if not isinstance(sent.error, ChannelClosed | Cancelled):
            # The rank ends, and `close` says why.
            self._error = sent.error
            self._channel.shutdown()
        self._drain()

    def _send_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            if isinstance(item, _Parcel):
                with self._beside_forwards(item):
                    ref = self._tensors.put(item.pixels, should_stop=self._should_stop)
                self._channel.send(item.message(ref))
            else:
                self._channel.send(item)

    @contextmanager
    def _beside_forwards(self, parcel: _Parcel) -> Iterator[None]:
        """Once the pixels are there, copy them while the device goes on computing."""
        if parcel.is_there is None or not isinstance(parcel.pixels, torch.Tensor):
            yield
            return
        parcel.is_there.synchronize()
        if self._copying is None:
            self._copying = torch.cuda.Stream(parcel.pixels.device, priority=-1)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._copying):
            yield

    def _should_stop(self) -> bool:
        """Whether nobody will release a slot of the tensor queue any more."""
        descriptor = self._channel.fileno()
        if self._is_closed.is_set() or descriptor < 0:
            return True
        poll = select.poll()
        poll.register(descriptor, 0)  # a hang-up is told in any case
        return bool(poll.poll(0))

    def _drain(self) -> None:
        """Nobody hears any more: nothing that a task gives may block it."""
        while self._waiting.get() is not None:
            pass


def _parcel(pixels: Array, message: Callable[[TensorRef], AnyReply]) -> _Parcel:
    if not isinstance(pixels, torch.Tensor) or not pixels.is_cuda:
        return _Parcel(pixels, message, None)
    # Blocking: the core of a thread that waits is free for others.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(pixels.device))
    return _Parcel(pixels, message, event)
