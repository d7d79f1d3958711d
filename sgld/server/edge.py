"""The edge of the app: ids of HTTP requests, the last resort for errors, and who is being answered."""

import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sgld.logs import request_id_var
from sgld.server.errors import ApiError

logger = logging.getLogger(__name__)
_METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH"})
# As nginx writes it.
_CLIENT_LEFT = 499
_GIVEN_ID = re.compile(r"[\w-]{1,64}", re.ASCII)


class Activity:
    """Counts the HTTP requests that are being answered, and those that were."""

    def __init__(self) -> None:
        self.num_active = 0
        self.paths: Mapping[object, str] = {}
        """The paths of routes by their handlers, as those of requests have ids in them."""
        self.num_requests: Counter[tuple[str, str]] = Counter()
        """By path of the route, and method."""
        self.num_responses: Counter[tuple[str, str, int]] = Counter()
        self._is_idle = anyio.Event()

    def begin(self) -> None:
        self.num_active += 1

    def end(self, scope: Scope, status: int) -> None:
        """:param status: 0 where the client left before it had an answer."""
        self.num_active -= 1
        endpoint = self.paths.get(scope.get("endpoint"), "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self.num_requests[endpoint, method] += 1
        self.num_responses[endpoint, method, status or _CLIENT_LEFT] += 1
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
            self._activity.end(scope, status)
            if self._log_requests:
                self._log(scope, request_id, status, time.monotonic() - started_at)
            request_id_var.reset(token)

    def _log(self, scope: Scope, request_id: str, status: int, took_s: float) -> None:
        method, path = scope["method"], scope["path"]
        fields = {"method": method, "path": path, "status": status, "took_s": round(took_s, 4)}
        logger.info("%s %s %s %d %.3f s", request_id, method, path, status, took_s, extra={"fields": fields})

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
