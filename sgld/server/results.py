"""Where clients get the files of results: here, or in a bucket."""

from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response

from sgld.server.errors import not_found
from sgld.server.services import services_of
from sgld.storage import Storage, Upload


class _File(FileResponse):
    """A file in larger pieces: each is read by a thread, and with Starlette's 3 MB take three times the CPU time."""

    chunk_size = 2**20


async def content(request: Request, key: str, media_type: str) -> Response:
    """A file, or a redirection to it, which OpenAI's clients and browsers follow.

    :raises ApiError: there is none.
    """
    storage = services_of(request).jobs.storage
    if (path := await storage.file(key)) is not None:
        return _File(path, media_type=media_type)
    if (url := await storage.url(key)) is not None:
        return RedirectResponse(url, 302)
    raise not_found(f"content of {key.partition('/')[0]} any more")


async def upload_of(storage: Storage, *keys: str) -> Upload | None:
    """Whether all these files are in the bucket; None where one isn't meant for it, or there is no file."""
    found = {await storage.upload(key) for key in keys}
    return None if None in found else "pending" if "pending" in found else next(iter(found), None)


async def url_of(request: Request, key: str, path: str) -> str:
    """From where the client gets a file.

    :param path: where this server has it.
    """
    return await services_of(request).jobs.storage.url(key) or f"{request.base_url}{path}"
