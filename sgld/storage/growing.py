"""A file that is read while it is written."""

from collections.abc import AsyncGenerator, Callable
from io import BufferedReader
from pathlib import Path

import anyio
from anyio.to_thread import run_sync

# Between looks at a file that hasn't grown; a part of it takes seconds.
_PAUSE_S = 0.05


class Growing:
    """Writes a file when it is called, in another thread, by appending to it; closed by whoever made it.

    :param write: it doesn't change what it has written.
    """

    def __init__(self, write: Callable[[Path], None]) -> None:
        self._write = write
        self._file: BufferedReader | None = None
        self._is_done = False

    def __call__(self, path: Path) -> None:
        """Write the file."""
        path.touch()
        # Opened here: when it is written it gets another name.
        self._file = path.open("rb")
        try:
            self._write(path)
        finally:
            self._is_done = True

    def close(self) -> None:
        """Read it no more."""
        if self._file is not None:
            self._file.close()

    async def parts(self, part_bytes: int) -> AsyncGenerator[bytes, None]:
        """All of it, in parts of one size but for the last, each as soon as it is there."""
        while (file := self._file) is None:  # noqa: ASYNC110 - another thread sets it
            await anyio.sleep(_PAUSE_S)
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
