"""Who may ask: API keys, and on loopback addresses only pages and programs of this machine.

A browser lets any page send requests to localhost, and a page whose name is made to mean 127.0.0.1 (DNS rebinding)
may read the answers, too. Both show in the headers Origin and Host.
"""

import hashlib
import hmac
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request, cookie_parser
from starlette.types import ASGIApp, Receive, Scope, Send

from sgld.config import ServerConfig
from sgld.server.errors import ApiError

ANYBODY = "anybody"
"""The owner of all requests where no keys are asked for."""
OPEN_PATHS = frozenset(
    {"/health", "/liveness", "/", "/dashboard.css", "/dashboard.js", "/docs", "/docs.js", "/openapi.json", "/login"}
)
"""What needs no key: probes, and pages that hold nothing of anybody."""
COOKIE = "sgld_session"
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_OWNER = "sgld.owner"


def read_keys(config: ServerConfig) -> tuple[str, ...]:
    """The keys of the flags and of the file.

    :raises ValueError: a key is empty or can't be sent in a header, or there are none in the file.
    :raises OSError: the file can't be read.
    """
    keys = [*config.api_key]
    if config.api_key_file is not None:
        lines = Path(config.api_key_file).read_text().splitlines()
        in_file = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not in_file:
            raise ValueError(f"the key file {config.api_key_file} holds no key")
        keys += in_file
    if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise ValueError("an API key must be printable ASCII without spaces, and not empty")
    return tuple(keys)


class Keys:
    """Tells whose a key is, in a time that doesn't depend on how much of it is right."""

    def __init__(self, keys: Iterable[str]) -> None:
        keys = tuple(keys)
        self._digests = [_digest(key) for key in keys]
        self._owner_by_cookie = {self.cookie(key): f"key_{_digest(key).hex()[:16]}" for key in keys}

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, key: str) -> str | None:
        """The identity behind a key, which doesn't tell the key; None if it is no key of ours."""
        digest = _digest(key)
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return f"key_{digest.hex()[:16]}" if any(found) else None

    def cookie(self, key: str) -> str:
        """What a browser has in the place of a key: it stays good after a restart, and the key isn't told by it."""
        return hmac.digest(key.encode(errors="surrogateescape"), b"sgld session cookie", "sha256").hex()

    def owner_of_cookie(self, cookie: str) -> str | None:
        """The identity behind the key that a cookie was made of; None if it is no key of ours."""
        given = cookie.encode(errors="surrogateescape")
        owners = [owner for known, owner in self._owner_by_cookie.items() if hmac.compare_digest(given, known.encode())]
        return owners[0] if owners else None


def owner_of(request: Request) -> str:
    """Whose request this is."""
    owner: str = request.scope[_OWNER]
    return owner


class Auth:
    """Middleware that lets only holders of a key pass, and says whose each request is."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its owner."""
        if scope["type"] == "http":
            scope[_OWNER] = self._owner(scope)
            if scope[_OWNER] is None:
                await _unauthorized(scope).response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _owner(self, scope: Scope) -> str | None:
        if not self._keys or scope["path"] in OPEN_PATHS:
            return ANYBODY
        headers = Headers(scope=scope)
        if "authorization" not in headers and _is_of_own_page(scope["method"], headers):
            cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
            return self._keys.owner_of_cookie(cookie)
        return self._keys.owner(_presented(scope))


class LocalOnly:
    """Middleware of a server on a loopback address: neither foreign pages nor foreign names.

    :param allowed_hosts: further names of this server.
    :param origins: further origins whose pages may use it; `*` for all.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Iterable[str], origins: Iterable[str]) -> None:
        self._app = app
        self._hosts = _LOOPBACK_NAMES | {host.lower() for host in allowed_hosts}
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and (error := self._problem(Headers(scope=scope))) is not None:
            await error.response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _problem(self, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if _name(f"//{host}") not in self._hosts:
            message = f"the host {host[:100]!r} isn't this server; if it is, start it with --allowed-hosts"
            return ApiError(403, message, "forbidden_host")
        origin = headers.get("origin")
        if origin is None or self._origins & {"*", origin} or _name(origin) in self._hosts:
            return None
        message = f"pages of {origin[:100]!r} may not use this server; if they may, start it with --cors-origins"
        return ApiError(403, message, "forbidden_origin")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on this address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _is_of_own_page(method: str, headers: Headers) -> bool:
    """Whether a cookie counts: pages of another port are of the same site, and browsers send it for these, too."""
    origin = headers.get("origin")
    if origin is None:
        return method in ("GET", "HEAD") and headers.get("sec-fetch-site", "none") in ("none", "same-origin")
    return urlsplit(origin).netloc.lower() == headers.get("host", "").lower()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _presented(scope: Scope) -> str:
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _unauthorized(scope: Scope) -> ApiError:
    has_key = bool(_presented(scope))
    message = "this API key isn't known here" if has_key else "an API key is needed: Authorization: Bearer KEY"
    return ApiError(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer"})


def _name(url: str) -> str | None:
    """The host of a URL, in lower case; None where it has none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
