"""A file that is read while it is written."""

from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import anyio
from anyio.to_thread import run_sync

# Between looks at a file that hasn't grown; a part of it takes seconds.
_PAUSE_S = 0.05


class Growing:
    """Writes a file when it is called, in another thread, by appending to it.

    :param write: it doesn't change what it has written.
    """

    def __init__(self, write: Callable[[Path], None]) -> None:
        self._write = write
        self._path: Path | None = None
        self._is_done = False

    def __call__(self, path: Path) -> None:
        """Write the file."""
        path.touch()
        self._path = path
        try:
            self._write(path)
        finally:
            self._is_done = True

    async def parts(self, part_bytes: int) -> AsyncGenerator[bytes, None]:
        """All of it, in parts of one size but for the last, each as soon as it is there."""
        while (path := self._path) is None:  # noqa: ASYNC110 - another thread sets it
            await anyio.sleep(_PAUSE_S)
        # It keeps its content when it gets its name.
        file = await run_sync(path.open, "rb")
        try:
            part = bytearray()
            while True:
                is_done = self._is_done
                content = await run_sync(file.read, part_bytes - len(part))
                part += content
                if len(part) == part_bytes:
                    yield bytes(part)
                    part.clear()
                elif not content and is_done:
                    break
                elif not content:
                    await anyio.sleep(_PAUSE_S)
            if part:
                yield bytes(part)
        finally:
            file.close()
