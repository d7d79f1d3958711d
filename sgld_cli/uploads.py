"""Uploads the files of `sgld generate`, where a bucket is chosen."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import msgspec
from anyio.to_thread import run_sync

from sgld.media.files import format_of, media_type_of
from sgld.storage.settings import resolved
from sgld.storage_config import StorageConfig
from sgld_cli.results import Written


class Bucket(Protocol):
    """What this needs of `sgld.storage.s3.Bucket`."""

    def name_of(self, key: str) -> str:
        """The name of the object of a file."""

    async def upload(self, name: str, path: Path, media_type: str) -> None:
        """Make an object of a file."""

    async def url(self, name: str) -> str:
        """From where an object is fetched."""


@asynccontextmanager
async def open_uploads(config: StorageConfig) -> AsyncIterator["Uploads | None"]:
    """What uploads files as long as the block lasts; None where no bucket is chosen.

    :raises StorageError: the bucket can't be used.
    :raises FieldError: a setting can't be.
    """
    if (chosen := resolved(config)) is None:
        yield None
        return
    from sgld.storage.s3 import open_bucket  # only who uploads needs it

    async with open_bucket(chosen) as bucket:
        # Who asked for files in a folder finds them there.
        yield Uploads(bucket, keeps_local=chosen.storage_keep_local is not False)


class Uploads:
    """Puts files into a bucket, under their own names."""

    def __init__(self, bucket: Bucket, *, keeps_local: bool) -> None:
        self._bucket = bucket
        self._keeps_local = keeps_local

    async def upload(self, files: Written) -> Written:
        """The same files with their URLs; without their paths, where they aren't kept here.

        :raises StorageError: one can't be uploaded; then all are still here.
        """
        paths = [Path(path) for path in (*files.paths, *files.frame_paths)]
        urls: list[str] = []
        for path in paths:
            name = self._bucket.name_of(path.name)
            await self._bucket.upload(name, path, media_type_of(format_of(path.name)))
            urls.append(await self._bucket.url(name))
        if self._keeps_local:
            return msgspec.structs.replace(files, urls=tuple(urls))
        for path in paths:
            await run_sync(path.unlink)
        return Written(urls=tuple(urls))
