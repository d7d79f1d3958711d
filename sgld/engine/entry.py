"""What the engine keeps of one request on its way."""

from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from sgld.engine.frames import FrameStore
from sgld.events import AnyEvent, Preview, Progress
from sgld.request import TRANSITIONS, Request, RequestState

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EventT = TypeVar("EventT", bound=AnyEvent)


class EventStream:
    """Events on their way to one consumer; putting never waits.

    Of progress and previews only the latest of each output is kept while the consumer is behind, so its length is
    bounded by what a request has to tell.
    """

    def __init__(self) -> None:
        self._events: deque[AnyEvent] = deque()
        self._has_news = anyio.Event()
        self._is_closed = False

    def put(self, event: AnyEvent) -> None:
        """Add an event, in the place of one that it outdates."""
        if isinstance(event, Progress | Preview):
            for index, other in enumerate(self._events):
                if type(other) is type(event) and other.output_index == event.output_index:
                    del self._events[index]
                    break
        self._events.append(event)
        self._has_news.set()

    def close(self) -> None:
        """Let the consumer take what is there, then None."""
        self._is_closed = True
        self._has_news.set()

    async def get(self) -> AnyEvent | None:
        """Wait for the next event; None when the stream is closed. No deadline: each request ends with an event."""
        while not self._events:
            if self._is_closed:
                return None
            self._has_news = anyio.Event()
            await self._has_news.wait()
        return self._events.popleft()


class Entry:
    """A request, its state, its results so far, and where its events go.

    :param group: the id of the client's call; its outputs share a stream.
    :param replica: index of the one that runs it.
    """

    def __init__(self, request: Request, group: str, replica: int = 0, stream: EventStream | None = None) -> None:
        self.request = request
        self.replica = replica
        self.stream = stream or EventStream()
        self.state = RequestState.QUEUED
        self.attempt = 1
        self.num_losses = 0
        self.frames = FrameStore()
        """Of the result, (F, H, W, 3 or 4)."""
        self.is_video = False
        self.sound: list[NDArray[np.float32]] = []
        """Pieces of the result, (channels, samples) each."""
        self.sample_rate: int | None = None
        self.postprocessing: tuple[str, ...] = ()
        self._group = group
        self._num_delivered = 0

    def change(self, state: RequestState) -> None:
        """Go to another state; what was decoded in an attempt that failed is dropped."""
        assert state in TRANSITIONS[self.state], f"{self.request.id}: {self.state} to {state}"
        self.state = state
        if state is RequestState.QUEUED:
            self.frames, self.sound = FrameStore(), []

    def put(self, event: AnyEvent) -> None:
        """Send an event to the consumer."""
        self.stream.put(event)

    def event(self, kind: type[EventT], **fields: Any) -> EventT:
        """An event of this output."""
        return kind(request_id=self._group, output_index=self.request.output_index, **fields)

    def keep(self, index: int, pixels: "NDArray[np.uint8]") -> "tuple[int, NDArray[np.uint8]] | None":
        """Keep a copy of frames from `index` on in the place of what was sent for them before; in any thread.

        :return: the index and frames among them that weren't delivered yet.
        """
        kept = self.frames.put(index, pixels)
        first = max(index, self._num_delivered)
        self._num_delivered = max(self._num_delivered, index + len(kept))
        return (first, kept[first - index :]) if first < index + len(kept) else None
