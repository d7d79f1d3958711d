"""The edge of the app: ids of HTTP requests, the last resort for errors, and who is being answered."""

import logging
import re
import secrets
import time
from collections.abc import Callable
from contextvars import ContextVar

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sgld.server.errors import ApiError

logger = logging.getLogger(__name__)
request_id_var: ContextVar[str | None] = ContextVar("request_id", default=None)
_GIVEN_ID = re.compile(r"[\w-]{1,64}", re.ASCII)


class Activity:
    """Counts the HTTP requests that are being answered."""

    def __init__(self) -> None:
        self.num_active = 0
        self._is_idle = anyio.Event()

    def begin(self) -> None:
        self.num_active += 1

    def end(self) -> None:
        self.num_active -= 1
        if not self.num_active:
            self._is_idle.set()

    async def wait_idle(self) -> None:
        """Wait until nobody is being answered."""
        while self.num_active:
            self._is_idle = anyio.Event()
            await self._is_idle.wait()


class Edge:
    """Middleware round all that may fail."""

    def __init__(self, app: ASGIApp, activity: Activity, *, log_requests: bool) -> None:
        self._app = app
        self._activity = activity
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, whatever happens."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        token = request_id_var.set(request_id)
        self._activity.begin()
        started_at, status = time.monotonic(), 0

        async def with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._guarded(scope, receive, with_id, lambda: status != 0)
        finally:
            self._activity.end()
            if self._log_requests:
                took_s = time.monotonic() - started_at
                logger.info("%s %s %s %d %.3f s", request_id, scope["method"], scope["path"], status, took_s)
            request_id_var.reset(token)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send, has_begun: Callable[[], bool]) -> None:
        try:
            await self._app(scope, receive, send)
        except ClientDisconnect:
            pass  # nobody is there to hear it
        except Exception:
            logger.exception("%s %s", scope["method"], scope["path"])
            # An answer that has begun is cut off, which the client sees.
            if has_begun():
                raise
            error = ApiError(500, "the server failed; its log says more under this x-request-id", "internal_error")
            await error.response(scope, receive, send)


def _request_id(scope: Scope) -> str:
    """The client's own id, if it is one that can stand in logs, else a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _GIVEN_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"
