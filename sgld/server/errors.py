"""Errors as HTTP answers, in the shape of OpenAI's.

`x-should-retry: false` is what keeps OpenAI's clients from sending twice more what will fail again.
"""

import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from math import ceil
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from sgld.errors import (
    EngineClosed,
    GenerationFailed,
    InvalidRequest,
    ModelError,
    OutOfMemory,
    PipelineFailed,
    QueueFull,
    RankLost,
    SgldError,
    StorageError,
)
from sgld.events import Cancelled, Failed

logger = logging.getLogger(__name__)
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
_NO_RETRY = {"x-should-retry": "false"}
# What says nothing of when there is room.
_RETRY_AFTER_S = 5.0
# OpenAI's clients give up above two minutes.
_MAX_RETRY_AFTER_S = 120.0
_PATH = re.compile(r" - at `\$\.?(.*)`$")
_CANCELLED = "cancelled"
_GENERATION_CODES = {error.code for error in (GenerationFailed, PipelineFailed, OutOfMemory, RankLost)}


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """What a client is told."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer that isn't a success."""

    error: ErrorBody


class ApiError(Exception):
    """An answer other than a success."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = ErrorResponse(error=ErrorBody(message=message, type=kind, param=param, code=code))

    @property
    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def not_found(what: str) -> ApiError:
    """What isn't there, or belongs to somebody else."""
    return ApiError(404, f"there is no {what}", "not_found")


def shutting_down() -> ApiError:
    """Another server, or this one in a moment, may take it."""
    return ApiError(503, "the server is shutting down", "shutting_down", headers=_retry_after(None))


def from_sgld(error: SgldError) -> ApiError:
    """The answer for an error of the engine."""
    match error:
        case InvalidRequest(param=param):
            code = "invalid_value" if error.code == InvalidRequest.code else error.code
            return ApiError(400, str(error), code, param=param)
        case QueueFull(retry_after_s=retry_after_s):
            return ApiError(429, str(error), error.code, headers=_retry_after(retry_after_s))
        case EngineClosed():
            return shutting_down()
        case ModelError():
            return ApiError(503, str(error), error.code, headers=_NO_RETRY)
        case StorageError():
            # Where it is, is the operator's business.
            return ApiError(
                503, "the file can't be fetched from where it is kept", error.code, headers=_retry_after(None)
            )
        case _:
            return ApiError(500, str(error), error.code, headers=_NO_RETRY)


def from_event(event: Failed | Cancelled) -> ApiError:
    """The answer for a request that didn't end well."""
    if isinstance(event, Cancelled):
        return ApiError(409, "the request was cancelled", _CANCELLED, headers=_NO_RETRY)
    if event.code in _GENERATION_CODES:
        return ApiError(500, event.message, event.code, headers=_NO_RETRY)
    status = {InvalidRequest.code: 400, ModelError.code: 503}.get(event.code, 500)
    code = "invalid_value" if status == 400 else event.code
    return ApiError(status, event.message, code, headers=_NO_RETRY)


def from_code(code: str, message: str) -> ApiError:
    """The answer for a job that didn't end well."""
    return from_event(
        Cancelled(request_id="") if code == _CANCELLED else Failed(request_id="", code=code, message=message)
    )


def from_validation(error: msgspec.MsgspecError) -> ApiError:
    """The answer for a body that can't be decoded, or isn't what it must be."""
    message = str(error)
    path = _PATH.search(message)
    plain = _PATH.sub("", message).replace("`", "")
    if not isinstance(error, msgspec.ValidationError):
        plain = f"the body can't be read as JSON: {plain}"
    param = path[1] or None if path else None
    return ApiError(400, f"{param}: {plain}" if param else plain, "invalid_value", param=param)


async def on_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for all that is answered in this shape."""
    match error:
        case ApiError():
            return error.response
        case SgldError():
            return from_sgld(error).response
        case msgspec.MsgspecError():
            return from_validation(error).response
        case RecursionError():
            # All that is walked by recursion is what clients send.
            return ApiError(400, "the body is nested too deeply", "invalid_value").response
        case OSError():
            logger.error("%s %s: %s", request.method, request.url.path, error)
            message = f"the server can't use its files: {error.strerror or error}"
            return ApiError(500, message, "storage_failed", headers=_NO_RETRY).response
        case HTTPException(status_code=status, detail=detail, headers=headers):
            code = HTTPStatus(status).name.lower()
            message = f"{request.method} {request.url.path}: {detail}" if status in (404, 405) else detail
            return ApiError(status, message, code, headers=headers).response
        case _:
            raise error


def _retry_after(seconds: float | None) -> dict[str, str]:
    seconds = _RETRY_AFTER_S if seconds is None else seconds
    return {"retry-after": str(max(1, ceil(min(seconds, _MAX_RETRY_AFTER_S))))}
