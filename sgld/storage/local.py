"""Results in a folder of this machine."""

import shutil
from functools import partial
from pathlib import Path, PurePosixPath

from anyio.to_thread import run_sync

from sgld.media.files import Content, write_atomically


class LocalStorage:
    """Files below a folder, which is made when the first one is kept.

    :raises OSError: from its methods, when the folder can't be used.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    async def put(self, key: str, content: Content, media_type: str, *, grows: bool = False) -> None:
        """Keep a file, in place of one that may be there; after that a power failure doesn't take it."""
        await run_sync(partial(write_atomically, self._path(key), content, is_durable=True))

    async def read(self, key: str) -> bytes | None:
        """The content of a file; None if there is none."""
        try:
            return await run_sync(self._path(key).read_bytes)
        except FileNotFoundError:
            return None

    async def file(self, key: str) -> Path | None:
        """The path of a file; None if there is none."""
        path = self._path(key)
        return path if await run_sync(path.is_file) else None

    @property
    def origins(self) -> tuple[str, ...]:
        """None: this server has all files."""
        return ()

    async def num_pending(self) -> int:
        """Always 0: what is kept is where it belongs."""
        return 0

    async def upload(self, key: str) -> None:
        """None: there is no bucket."""

    async def url(self, key: str) -> str | None:
        """None: local files are served by the server."""
        return None

    async def remove(self, key: str) -> None:
        """Remove a file, if there is one; its folder stays, as there may be more to come."""
        await run_sync(self._path(key).unlink, True)

    async def delete(self, folder: str) -> None:
        """Remove a folder and what is in it."""
        await run_sync(shutil.rmtree, self._path(folder), True)

    def _path(self, key: str) -> Path:
        parts = PurePosixPath(key).parts
        assert parts, "a key must name something"
        assert not {"..", "/"} & set(parts), f"{key!r} leads out of the folder"
        return self._folder.joinpath(*parts)
