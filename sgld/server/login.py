"""/login: a browser's event streams can't send a key, so it is exchanged for a cookie that pages can't read."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sgld.server.auth import COOKIE, Keys
from sgld.server.bodies import read_json
from sgld.server.errors import ApiError, json_response

_MAX_AGE_S = 30 * 86400


class Login(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key."""

    key: str


class LoginState(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a key is needed here, and whether this browser has given one."""

    needs_key: bool
    logged_in: bool


async def get_login(request: Request) -> Response:
    """GET /login: whether there is something to do."""
    keys: Keys = request.app.state.keys
    is_known = keys.owner_of_cookie(request.cookies.get(COOKIE, "")) is not None
    return json_response(LoginState(needs_key=bool(keys), logged_in=is_known or not keys))


async def login(request: Request) -> Response:
    """POST /login: the cookie for a key."""
    keys: Keys = request.app.state.keys
    given = msgspec.convert(await read_json(request), Login)
    if keys and keys.owner(given.key) is None:
        raise ApiError(401, "this API key isn't known here", "invalid_api_key", param="key")
    response = json_response(LoginState(needs_key=bool(keys), logged_in=True))
    if keys:
        response.set_cookie(
            COOKIE,
            keys.cookie(given.key),
            max_age=_MAX_AGE_S,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
    return response


async def logout(request: Request) -> Response:
    """DELETE /login: the browser forgets the cookie."""
    keys: Keys = request.app.state.keys
    response = json_response(LoginState(needs_key=bool(keys), logged_in=not keys))
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return response
