"""Results that go to a bucket, and stay in a folder until they are there."""

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from itertools import chain, repeat
from pathlib import Path

import anyio

from sgld.errors import StorageError
from sgld.storage import Content, Storage, Upload
from sgld.storage.growing import Growing
from sgld.storage.ledger import Entry, Ledger
from sgld.storage.local import LocalStorage
from sgld.storage.s3 import PART_BYTES, Bucket, open_bucket
from sgld.storage.settings import resolved
from sgld.storage_config import StorageConfig

logger = logging.getLogger(__name__)
PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Between attempts while nothing arrives; the last again and again."""
_PATIENCE_S = 30.0
_SLOWEST_BYTES_PER_S = 2**20


@asynccontextmanager
async def open_storage(config: StorageConfig, folder: Path) -> AsyncIterator[Storage]:
    """Where a server keeps results: a folder, and a bucket if one is chosen.

    :raises StorageError: the bucket can't be used.
    :raises FieldError: a setting can't be.
    :raises OSError: the folder can't be.
    """
    local = LocalStorage(folder / "results")
    if (chosen := resolved(config)) is None:
        yield local
        return
    async with open_bucket(chosen) as bucket:
        with closing(Ledger(folder / "uploads.sqlite3")) as ledger:
            storage = CloudStorage(local, bucket, ledger, keeps_local=bool(chosen.storage_keep_local))
            async with storage.open():
                yield storage


class CloudStorage:
    """Files that are kept in a folder first, and then uploaded.

    What can't be uploaded stays in the folder, is served from there, and is tried again until it can, also by the next
    server.

    :raises OSError: from its methods, when the folder can't be used.
    :raises StorageError: from `read`, when the bucket can't be.
    """

    def __init__(
        self,
        local: LocalStorage,
        bucket: Bucket,
        ledger: Ledger,
        *,
        keeps_local: bool = False,
        pauses_s: tuple[float, ...] = PAUSES_S,
    ) -> None:
        self._local = local
        self._bucket = bucket
        self._ledger = ledger
        self._keeps_local = keeps_local
        self._pauses_s = pauses_s
        self._is_down = False
        """The last attempt failed: nobody waits for the next one."""
        self._busy: set[str] = set()
        """Keys that are tried now."""
        self._wake = anyio.Event()
        self._settled = anyio.Event()

    @property
    def origins(self) -> tuple[str, ...]:
        """From where else than this server clients get files."""
        return (self._bucket.origin,)

    async def num_pending(self) -> int:
        """How many files aren't yet where they belong."""
        return await self._ledger.count_unsettled()

    async def wait_settled(self) -> None:
        """Wait until all files are where they belong."""
        while True:
            settled = self._settled
            if not await self.num_pending():
                return
            await settled.wait()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Work on what waits until the block ends, first on what an earlier process left."""
        left = await self._ledger.unsettled()
        if left:
            logger.info("%d files of an earlier start aren't in the bucket as they should be yet", len(left))
            self._wake.set()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._settle_all, {entry.key for entry in left})
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()

    async def put(self, key: str, content: Content, media_type: str, *, grows: bool = False) -> None:
        """Keep a file; if it can be uploaded soon, it is when this returns. One that grows is uploaded meanwhile."""
        # What is on its way under this key was there before, and must arrive before.
        is_tried = not self._is_down and key not in self._busy
        try:
            if grows and is_tried and not isinstance(content, bytes):
                await self._put_growing(key, Growing(content), media_type)
                return
            await self._local.put(key, content, media_type)
            entry = await self._ledger.add(key, self._bucket.name_of(key), media_type)
            if is_tried:
                with anyio.move_on_after(_patience_s(await self._size(key))):
                    await self._try(entry)
        finally:
            self._wake.set()

    async def _put_growing(self, key: str, growing: Growing, media_type: str) -> None:
        """Write a file and upload it meanwhile; if the latter fails, it is a file as others."""
        entry = await self._ledger.add(key, self._bucket.name_of(key), media_type)
        sizes: list[int] = []
        self._busy.add(key)

        async def upload() -> None:
            try:
                sizes.append(await self._bucket.upload_parts(entry.name, growing.parts(PART_BYTES), media_type))
            except StorageError as error:
                await self._failed(entry, error)

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(upload)
                await self._local.put(key, growing, media_type)
                tasks.cancel_scope.deadline = anyio.current_time() + _patience_s(await self._size(key))
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self._ledger.drop(entry)
            if isinstance(error, ExceptionGroup):  # a matter of this function
                raise error.exceptions[0] from None
            raise
        finally:
            self._busy.discard(key)
            growing.close()
        if sizes == [await self._size(key)]:
            await self._uploaded(entry)
            self._succeeded()

    async def _size(self, key: str) -> int:
        path = await self._local.file(key)
        return 0 if path is None else (await anyio.Path(path).stat()).st_size

    async def read(self, key: str) -> bytes | None:
        """The content of a file, wherever it is; None if there is none."""
        if (content := await self._local.read(key)) is not None:
            return content
        entry = await self._ledger.get(key)
        return await self._bucket.read(entry.name) if entry is not None and entry.state == "stored" else None

    async def file(self, key: str) -> Path | None:
        """The path of a file, if it is here."""
        return await self._local.file(key)

    async def upload(self, key: str) -> Upload | None:
        """Whether a file is in the bucket; None: it isn't meant for it, as it came when there was none."""
        entry = await self._ledger.get(key)
        if entry is None:
            return None
        return "uploaded" if entry.state == "stored" else "pending"

    async def url(self, key: str) -> str | None:
        """From where clients get a file that was uploaded; None for others."""
        entry = await self._ledger.get(key)
        return await self._bucket.url(entry.name) if entry is not None and entry.state == "stored" else None

    async def delete(self, folder: str) -> None:
        """Remove a folder and what is in it, here and in the bucket; there it may take until that can be reached."""
        entries = await self._ledger.doom(folder)
        await self._local.delete(folder)
        for entry in entries:
            if self._is_down or not await self._try(entry):
                self._wake.set()
                return

    async def _settle_all(self, left: set[str]) -> None:
        """Try one file after the other, with pauses while nothing works.

        :param left: keys of an earlier process, which may have left parts of files.
        """
        pauses = self._endless_pauses()
        while True:
            self._wake = anyio.Event()
            entry = next((e for e in await self._ledger.unsettled() if e.key not in self._busy), None)
            if entry is None:
                await self._wake.wait()
                pauses = self._endless_pauses()
            elif await self._try(entry, has_parts=entry.key in left):
                pauses = self._endless_pauses()
            else:
                await anyio.sleep(next(pauses))

    def _endless_pauses(self) -> Iterator[float]:
        return chain(self._pauses_s, repeat(self._pauses_s[-1]))

    async def _try(self, entry: Entry, *, has_parts: bool = False) -> bool:
        """Upload or delete a file; whether that worked."""
        self._busy.add(entry.key)
        try:
            if has_parts:
                await self._bucket.abort_uploads(entry.name)
            await (self._remove(entry) if entry.state == "deleting" else self._upload(entry))
        except StorageError as error:
            await self._failed(entry, error)
            return False
        finally:
            self._busy.discard(entry.key)
        self._succeeded()
        return True

    async def _failed(self, entry: Entry, error: StorageError) -> None:
        await self._ledger.failed(entry)
        level = logging.DEBUG if self._is_down else logging.WARNING
        logger.log(level, "%s; it is tried again, and what isn't uploaded is served from here", error)
        self._is_down = True

    def _succeeded(self) -> None:
        if self._is_down:
            logger.warning("the bucket can be used again")
        self._is_down = False
        self._settled.set()
        self._settled = anyio.Event()

    async def _upload(self, entry: Entry) -> None:
        path = await self._local.file(entry.key)
        if path is None:
            logger.error("%s can't be uploaded: it isn't there any more", entry.key)
            await self._ledger.drop(entry)
            return
        await self._bucket.upload(entry.name, path, entry.media_type)
        await self._uploaded(entry)

    async def _uploaded(self, entry: Entry) -> None:
        """An object is there: that is written down, unless nobody wants it any more."""
        if await self._ledger.settle(entry):
            if not self._keeps_local:
                await self._local.remove(entry.key)
        elif (now := await self._ledger.get(entry.key)) is None or now.state == "deleting":
            await self._bucket.delete(entry.name)

    async def _remove(self, entry: Entry) -> None:
        await self._bucket.delete(entry.name)
        await self._ledger.drop(entry)


def _patience_s(size_bytes: int) -> float:
    """How long an answer waits for the upload of a file: as long as 1 MiB/s takes, and half a minute."""
    return _PATIENCE_S + size_bytes / _SLOWEST_BYTES_PER_S
