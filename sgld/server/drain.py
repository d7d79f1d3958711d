"""Reads what a client still sends when its answer is already made.

Hypercorn 0.18 ends a whole HTTP/2 connection, with all its streams, when an answer is complete before the upload is, or
when the client stops its upload because it sees an error; over HTTP/1.1 a client may see a reset in place of the
answer. So the rest of the upload is read before the answer begins.
"""

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Who sends more than this after the answer may see a reset.
_MAX_BYTES = 256 * 1024 * 1024
_TIMEOUT_S = 10.0


class Drain:
    """Outermost middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, and note whether the body was read to its end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_read = False

        async def noting() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = is_read or message["type"] == "http.disconnect" or not message.get("more_body", False)
            return message

        async def drained(message: Message) -> None:
            if message["type"] == "http.response.start" and not is_read:
                with anyio.move_on_after(_TIMEOUT_S):
                    size = 0
                    while not is_read and size < _MAX_BYTES:
                        size += len((await noting()).get("body", b""))
            await send(message)

        await self._app(scope, noting, drained)
