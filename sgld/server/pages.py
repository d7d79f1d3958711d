"""The pages that ship: the dashboard and the API's, with nothing from elsewhere."""

import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from sgld.server.services import services_of

# `{}`: from where else files of results come.
_CONTENT_SECURITY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:{}; media-src 'self'{}; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_HEADERS = {
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_FOLDER = files("sgld.server") / "dashboard"
_CONTENTS = {path.name: path.read_bytes() for path in _FOLDER.iterdir() if path.name.rpartition(".")[2] in _TYPES}


async def dashboard(request: Request) -> Response:
    """GET /: the page from which requests are made and watched."""
    return _page(request, "dashboard.html")


async def docs(request: Request) -> Response:
    """GET /docs: the API, to read."""
    return _page(request, "docs.html")


async def asset(request: Request) -> Response:
    """GET of what these pages consist of."""
    return _page(request, request.url.path.rpartition("/")[2])


def _page(request: Request, name: str) -> Response:
    content = _CONTENTS[name]
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    origins = "".join(f" {origin}" for origin in services_of(request).jobs.storage.origins)
    headers = {**_HEADERS, "content-security-policy": _CONTENT_SECURITY.format(origins, origins), "etag": etag}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=_TYPES[name.rpartition(".")[2]])
