"""Files that go to a bucket, which may not be there when they come."""

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
from anyio.to_thread import run_sync
from blockbuster import blockbuster_ctx

from sgld.server.results import upload_of
from sgld.storage import s3
from sgld.storage.cloud import CloudStorage, open_storage
from sgld.storage.ledger import Ledger
from sgld.storage.local import LocalStorage
from sgld.storage.s3 import PART_BYTES, open_bucket
from sgld.storage_config import StorageConfig

from .s3_server import S3Server

TIMEOUT_S = 60


@pytest.fixture
def server(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    monkeypatch.setenv("SGLD_S3_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("SGLD_S3_SECRET_ACCESS_KEY", "secret")
    # Else each failure takes the client's own pauses.
    monkeypatch.setattr(s3, "_ATTEMPTS", 1)
    return bucket


def write_one(path: Path) -> None:
    path.write_bytes(b"one")


@asynccontextmanager
async def storage_of(server: S3Server, folder: Path, **settings: Any) -> AsyncIterator[CloudStorage]:
    """A storage that hardly waits before it tries again."""
    with anyio.fail_after(TIMEOUT_S), closing(Ledger(folder / "uploads.sqlite3")) as ledger:
        async with open_bucket(server.config()) as bucket:
            storage = CloudStorage(LocalStorage(folder / "results"), bucket, ledger, pauses_s=(0.01,), **settings)
            async with storage.open():
                yield storage


async def test_a_file_is_in_the_bucket_when_it_is_kept(server: S3Server, tmp_path: Path) -> None:
    async with storage_of(server, tmp_path) as storage, httpx2.AsyncClient() as http:
        await storage.put("a/0.png", b"zero", "image/png")
        await storage.put("b/0.png", write_one, "image/png")
        url = await storage.url("a/0.png")
        assert url is not None
        assert (await http.get(url)).content == b"zero"
        assert (await storage.file("a/0.png"), await storage.read("a/0.png")) == (None, b"zero")
        assert (await storage.url("a/1.png"), await storage.read("a/1.png")) == (None, None)
        assert storage.origins == (server.url,)

        await storage.delete("a")
        await storage.delete("a")

        assert (await storage.url("a/0.png"), await storage.read("a/0.png")) == (None, None)

    assert {name: (found.value, found.metadata["Content-Type"]) for name, found in server.objects.items()} == {
        "b/0.png": (b"one", "image/png")
    }


async def test_of_files_that_came_without_a_bucket_no_upload_is_told(server: S3Server, tmp_path: Path) -> None:
    await LocalStorage(tmp_path / "results").put("a/0.png", b"zero", "image/png")
    async with storage_of(server, tmp_path) as storage:
        await storage.put("b/0.png", b"zero", "image/png")
        assert await storage.read("a/0.png") == b"zero"
        assert await upload_of(storage, "a/0.png") is None
        assert await upload_of(storage, "b/0.png") == "uploaded"
        assert await upload_of(storage, "a/0.png", "b/0.png") is None


async def test_the_event_loop_is_never_blocked(server: S3Server, tmp_path: Path) -> None:
    async with storage_of(server, tmp_path) as storage:
        with blockbuster_ctx():
            await storage.put("a/0.mp4", b"x" * (PART_BYTES + 1), "video/mp4")
            await storage.put("a/1.mp4", write_one, "video/mp4", grows=True)
            assert await storage.url("a/0.mp4") is not None
            assert await storage.read("a/1.mp4") == b"one"
            await storage.delete("a")

    assert server.objects == {}


async def test_the_local_file_is_kept_where_that_is_asked(server: S3Server, tmp_path: Path) -> None:
    async with storage_of(server, tmp_path, keeps_local=True) as storage:
        await storage.put("a/0.png", b"zero", "image/png")

        assert await storage.url("a/0.png") is not None
        assert await storage.file("a/0.png") == tmp_path / "results" / "a" / "0.png"


async def test_what_cant_be_uploaded_stays_and_is_uploaded_when_the_server_is_back(
    server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with storage_of(server, tmp_path) as storage:
        await run_sync(server.stop)
        await storage.put("a/0.png", b"zero", "image/png")
        await storage.put("a/1.png", b"one", "image/png")
        assert (await storage.url("a/0.png"), await storage.read("a/0.png")) == (None, b"zero")
        assert await storage.num_pending() == 2

        await run_sync(server.start)
        await storage.wait_settled()

        assert await storage.url("a/0.png") is not None
        assert await storage.file("a/0.png") is None
        await storage.put("a/2.png", b"two", "image/png")
        assert await storage.num_pending() == 0

    assert {name: found.value for name, found in server.objects.items()} == {
        "a/0.png": b"zero",
        "a/1.png": b"one",
        "a/2.png": b"two",
    }
    warnings = [record.getMessage() for record in caplog.records if record.name == "sgld.storage.cloud"]
    assert len(warnings) == 2, "one when it begins, one when it ends"
    assert f"{server.url} can't be reached" in warnings[0]
    assert "secret" not in "".join(warnings)


async def test_a_restart_goes_on_with_what_is_left(server: S3Server, tmp_path: Path) -> None:
    """As after a kill: the row and the file are there, and the parts that arrived."""
    large = b"x" * (PART_BYTES + 1)
    async with storage_of(server, tmp_path) as storage:
        server.hold = lambda request: "partNumber=2" in request
        server.refuse = lambda request: request.startswith("DELETE") or ("partNumber" in request and server.go.is_set())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(storage.put, "a/0.mp4", large, "video/mp4")
            await run_sync(server.held.wait, abandon_on_cancel=True)
            tasks.cancel_scope.cancel()
    server.go.set()
    assert server.unfinished == ["a/0.mp4"]
    server.refuse = server.hold = lambda request: False

    async with storage_of(server, tmp_path) as storage:
        await storage.wait_settled()

    assert server.objects["a/0.mp4"].value == large
    assert server.unfinished == []
    assert not list((tmp_path / "results").rglob("*.mp4"))


async def test_what_is_deleted_while_the_server_is_away_goes_when_it_is_back(server: S3Server, tmp_path: Path) -> None:
    async with storage_of(server, tmp_path) as storage:
        await storage.put("a/0.png", b"zero", "image/png")
        await run_sync(server.stop)
        await storage.delete("a")
        assert await storage.url("a/0.png") is None
    await run_sync(server.start)
    assert list(server.objects) == ["a/0.png"]

    async with storage_of(server, tmp_path) as storage:
        await storage.wait_settled()

    assert server.objects == {}


async def test_what_is_deleted_while_it_is_uploaded_isnt_left(server: S3Server, tmp_path: Path) -> None:
    server.hold = lambda request: request.startswith("PUT") and "0.png" in request
    async with storage_of(server, tmp_path) as storage, anyio.create_task_group() as tasks:
        tasks.start_soon(storage.put, "a/0.png", b"zero", "image/png")
        await run_sync(server.held.wait, abandon_on_cancel=True)
        await storage.delete("a")
        server.go.set()

    assert server.objects == {}


async def test_a_file_that_takes_the_place_of_another_is_what_arrives(server: S3Server, tmp_path: Path) -> None:
    server.hold = lambda request: request.startswith("PUT") and "0.png" in request
    async with storage_of(server, tmp_path) as storage, anyio.create_task_group() as tasks:
        tasks.start_soon(storage.put, "a/0.png", b"old", "image/png")
        await run_sync(server.held.wait, abandon_on_cancel=True)
        await storage.put("a/0.png", b"newer", "image/png")
        server.go.set()
        await storage.wait_settled()
        assert await storage.read("a/0.png") == b"newer"

    assert server.objects["a/0.png"].value == b"newer"


def writing_two_parts(go: anyio.Event) -> Callable[[Path], None]:
    """Appends a part, waits, and appends another one."""

    def write(path: Path) -> None:
        with path.open("ab") as file:
            file.write(b"x" * PART_BYTES)
            file.flush()
            anyio.from_thread.run(go.wait)
            file.write(b"y" * 1000)

    return write


async def test_a_file_that_grows_is_uploaded_meanwhile(server: S3Server, tmp_path: Path) -> None:
    go = anyio.Event()
    async with storage_of(server, tmp_path) as storage, anyio.create_task_group() as tasks:
        server.hold = lambda request: "partNumber=1&" in request
        tasks.start_soon(partial(storage.put, grows=True), "a/0.mp4", writing_two_parts(go), "video/mp4")
        await run_sync(server.held.wait, abandon_on_cancel=True)
        assert not go.is_set()
        server.go.set()
        go.set()
    async with storage_of(server, tmp_path) as storage:
        assert await storage.url("a/0.mp4") is not None
        assert await storage.file("a/0.mp4") is None

    assert server.objects["a/0.mp4"].value == b"x" * PART_BYTES + b"y" * 1000
    assert server.objects["a/0.mp4"].metadata["Content-Type"] == "video/mp4"


async def test_a_file_that_grows_is_kept_where_its_upload_fails(server: S3Server, tmp_path: Path) -> None:
    go = anyio.Event()
    async with storage_of(server, tmp_path) as storage:
        server.refuse = lambda request: "partNumber=1&" in request and not go.is_set()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(storage.put, grows=True), "a/0.mp4", writing_two_parts(go), "video/mp4")
            while not any("partNumber=1&" in request for request in server.requests):
                await anyio.wait_all_tasks_blocked()
            go.set()
        await storage.wait_settled()

    assert len(server.objects["a/0.mp4"].value) == PART_BYTES + 1000
    assert server.unfinished == []


async def test_of_a_file_that_cant_be_written_nothing_is_left(server: S3Server, tmp_path: Path) -> None:
    """Not even of an upload that the server has just begun."""
    server.hold = lambda request: "0.mp4?uploads" in request
    has_failed = threading.Event()

    def fail(path: Path) -> None:
        assert server.held.wait(TIMEOUT_S)
        has_failed.set()
        raise OSError("no room")

    async with storage_of(server, tmp_path) as storage:

        async def put() -> None:
            with pytest.raises(OSError, match="no room"):
                await storage.put("a/0.mp4", fail, "video/mp4", grows=True)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(put)
            await run_sync(has_failed.wait, TIMEOUT_S)
            await anyio.wait_all_tasks_blocked()
            server.go.set()
        assert await storage.num_pending() == 0

    assert (server.objects, server.unfinished) == ({}, [])


async def test_a_file_that_somebody_took_away_is_forgotten(server: S3Server, tmp_path: Path) -> None:
    async with storage_of(server, tmp_path) as storage:
        await run_sync(server.stop)
        await storage.put("a/0.png", b"zero", "image/png")
        (tmp_path / "results" / "a" / "0.png").unlink()
        await run_sync(server.start)
        await storage.wait_settled()

        assert await storage.url("a/0.png") is None


async def test_without_a_bucket_files_stay_here(tmp_path: Path) -> None:
    async with open_storage(StorageConfig(), tmp_path) as storage:
        await storage.put("a/0.png", b"zero", "image/png")

        assert isinstance(storage, LocalStorage)
        assert (await storage.num_pending(), storage.origins) == (0, ())
