"""Server-sent events, written by hand: what clients of OpenAI's streams choke on is never sent.

An `id:` or a `retry:` makes openai-python take each blank line for an event and fail on its empty data, so heartbeats
are comments without a blank line, and only our own streams have ids. Source: https://html.spec.whatwg.org, 9.2.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import anyio
import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

HEADERS = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}
_PING = b": ping\n"
# A reader that takes nothing for so long is gone, or should be.
_SEND_TIMEOUT_S = 30.0


def encode_event(name: str, data: Any, *, event_id: str | None = None) -> bytes:
    """One event; its JSON has no line breaks, so that there is one line of data.

    :param event_id: only for streams that aren't OpenAI's.
    """
    id_line = b"" if event_id is None else f"id: {event_id}\n".encode()
    return b"".join((b"event: ", name.encode(), b"\n", id_line, b"data: ", msgspec.json.encode(data), b"\n\n"))


class EventStream(StreamingResponse):
    """Sends what a generator yields, and heartbeats while it has nothing to say.

    The generator is closed when the client is gone or takes nothing any more.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], *, heartbeat_s: float) -> None:
        super().__init__(events, headers=HEADERS, media_type="text/event-stream")
        self._events = events
        self._heartbeat_s = heartbeat_s
        self._num_begun = 0
        self._num_sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all; returns when there is nothing more, or nobody to send it to."""
        async with anyio.create_task_group() as tasks, aclosing(self._events):
            tasks.start_soon(_watch, receive, tasks.cancel_scope)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            tasks.start_soon(self._beat, send, tasks.cancel_scope)
            async for chunk in self._events:
                self._num_begun += 1
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                self._num_sent += 1
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            tasks.cancel_scope.cancel()

    async def _beat(self, send: Send, stream: anyio.CancelScope) -> None:
        """In a task of its own, so that chunks need no deadline each: that of 500 who watch costs."""
        while True:
            before = self._num_begun
            await anyio.sleep(self._heartbeat_s)
            if before != self._num_begun:
                continue
            if self._num_sent == self._num_begun:
                with anyio.move_on_after(_SEND_TIMEOUT_S) as timeout:
                    await send({"type": "http.response.body", "body": _PING, "more_body": True})
                is_gone = timeout.cancelled_caught
            else:
                await anyio.sleep(_SEND_TIMEOUT_S)
                is_gone = before == self._num_begun and self._num_sent != self._num_begun
            if is_gone:
                stream.cancel()


async def _watch(receive: Receive, stream: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.cancel()
