"""Where results are kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

Content = bytes | Callable[[Path], None]
"""What a file shall contain, or a function that writes it to a path, in a thread."""


Upload = Literal["uploaded", "pending"]
"""Where a file for a bucket is: there; or here, and its upload is tried until it works."""


class Storage(Protocol):
    """Files by key, such as `img_12/0.png`. Nothing here blocks the event loop."""

    @property
    def origins(self) -> tuple[str, ...]:
        """From where else than this server clients get files: scheme and host of each."""

    async def num_pending(self) -> int:
        """How many files aren't yet where they belong."""

    async def put(self, key: str, content: Content, media_type: str, *, grows: bool = False) -> None:
        """Keep a file; it appears whole or not at all.

        :param grows: the function that writes it only appends to it.
        :raises OSError: it can't be kept.
        """

    async def read(self, key: str) -> bytes | None:
        """The content of a small file; None if there is none.

        :raises StorageError: it is elsewhere and can't be fetched.
        """

    async def file(self, key: str) -> Path | None:
        """A local file with this content; None if there is none, or it is elsewhere."""

    async def upload(self, key: str) -> Upload | None:
        """Whether a file is in the bucket; None: it isn't meant for one."""

    async def url(self, key: str) -> str | None:
        """From where clients fetch it without this server, for a while; None if they can't."""

    async def delete(self, folder: str) -> None:
        """Remove all files of a folder, if there are any."""
