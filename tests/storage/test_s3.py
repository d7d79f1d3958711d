"""A bucket of a real S3 server."""

import random
import traceback
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import anyio
import httpx2
import pytest

from sgld.errors import StorageError
from sgld.storage import s3
from sgld.storage.s3 import PART_BYTES, open_bucket

from .s3_server import BUCKET, S3Server, credentials_count

SECRET = "a-secret-that-nobody-may-see"
CONTENT = random.Random(0).randbytes(2 * PART_BYTES + 1000)
KEY_ID = "AKIDTHATNOBODYMAYSEE"


@pytest.fixture
def server(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    monkeypatch.setenv("SGLANG_S3_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("SGLD_S3_SECRET_ACCESS_KEY", SECRET)
    return bucket


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file of three parts."""
    path = tmp_path / "large.mp4"
    path.write_bytes(CONTENT)
    return path


def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.png"
    path.write_bytes(b"a picture")
    return path


async def test_an_object_has_its_type_and_is_fetched_by_a_signed_url(server: S3Server, tmp_path: Path) -> None:
    config = server.config(s3_key_prefix="made here/", s3_presign_seconds=77)
    async with open_bucket(config) as bucket, httpx2.AsyncClient() as http:
        assert server.objects == {}
        assert server.unfinished == []
        name = bucket.name_of("img_1/0 ä.png")
        await bucket.upload(name, small(tmp_path), "image/png")
        url = await bucket.url(name)
        found = await http.get(url)
        content = await bucket.read(name)

    assert list(server.objects) == ["made here/img_1/0 ä.png"]
    assert (found.status_code, found.content, found.headers["content-type"]) == (200, b"a picture", "image/png")
    assert urlsplit(url).path.startswith(f"/{BUCKET}/made%20here/")
    assert parse_qs(urlsplit(url).query)["X-Amz-Expires"] == ["77"]
    assert f"{urlsplit(url).scheme}://{urlsplit(url).netloc}" == bucket.origin == server.url
    assert content == b"a picture"
    assert SECRET not in url


async def test_a_large_file_goes_in_parts(server: S3Server, large: Path) -> None:
    async with open_bucket(server.config()) as bucket:
        await bucket.upload("large.mp4", large, "video/mp4")

    found = server.objects["large.mp4"]
    assert found.value == CONTENT
    assert found.etag.strip('"').endswith("-3")
    assert server.unfinished == []


async def test_parts_are_removed_where_the_rest_cant_follow(server: S3Server, large: Path) -> None:
    server.refuse = lambda request: "partNumber=2" in request
    async with open_bucket(server.config()) as bucket:
        with pytest.raises(StorageError, match="doesn't take large"):
            await bucket.upload("large.mp4", large, "video/mp4")

    # The client tries a part three times by itself.
    assert len([request for request in server.requests if "partNumber=2" in request]) == 3
    assert server.unfinished == []


async def test_what_an_interrupted_upload_left_is_removed(server: S3Server, large: Path) -> None:
    server.hold = lambda request: "partNumber=2" in request
    async with open_bucket(server.config()) as bucket:
        server.refuse = lambda request: request.startswith("DELETE")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bucket.upload, "large.mp4", large, "video/mp4")
            await anyio.to_thread.run_sync(server.held.wait, abandon_on_cancel=True)
            tasks.cancel_scope.cancel()
        left = server.unfinished
        server.refuse = lambda request: False
        server.go.set()
        await bucket.abort_uploads("large.mp")
        assert server.unfinished == left == ["large.mp4"]
        await bucket.abort_uploads("large.mp4")

    assert server.unfinished == []


async def test_an_object_that_isnt_whole_is_an_error(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_bucket(server.config()) as bucket:
        put = bucket._client.put_object

        async def half(Body: bytes, ContentMD5: str, **about: str) -> Any:  # noqa: N803  # S3's names
            return await put(Body=Body[:3], **about)

        monkeypatch.setattr(bucket._client, "put_object", half)
        with pytest.raises(StorageError, match="3 bytes in the bucket, and 9 here"):
            await bucket.upload("small.png", small(tmp_path), "image/png")


async def test_a_bucket_may_have_other_tags_than_checksums(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that encrypts with keys of its own."""
    async with open_bucket(server.config()) as bucket:
        put = bucket._client.put_object

        async def encrypted(**about: Any) -> Any:
            return await put(**about) | {"ETag": '"0123"'}

        monkeypatch.setattr(bucket._client, "put_object", encrypted)
        await bucket.upload("small.png", small(tmp_path), "image/png")

    assert f"HEAD /{BUCKET}/small.png" in server.requests


async def test_objects_are_deleted_and_missing_ones_too(server: S3Server, tmp_path: Path) -> None:
    async with open_bucket(server.config()) as bucket:
        await bucket.upload("small.png", small(tmp_path), "image/png")
        await bucket.delete("small.png")
        await bucket.delete("small.png")
        with pytest.raises(StorageError, match="there is no such object"):
            await bucket.read("small.png")

    assert server.objects == {}


async def test_urls_may_be_public(server: S3Server) -> None:
    async with open_bucket(server.config(s3_public_url="https://cdn.example.com/x/")) as bucket:
        assert await bucket.url("img_1/0 0.png") == "https://cdn.example.com/x/img_1/0%200.png"
        assert bucket.origin == "https://cdn.example.com"


async def refusal(server: S3Server, **settings: str) -> str:
    """Why the bucket can't be used, in one line without secrets."""
    with pytest.raises(StorageError) as refused:
        async with open_bucket(server.config(**settings)):
            pass
    assert refused.value.__suppress_context__
    text = "".join(traceback.format_exception(refused.value))
    assert SECRET not in text
    assert KEY_ID not in text
    assert "\n" not in str(refused.value)
    return str(refused.value)


async def test_a_bucket_that_is_missing_is_told_at_once(server: S3Server) -> None:
    assert await refusal(server, s3_bucket_name="nowhere") == (
        "the bucket 'nowhere' can't be used: there is no such bucket"
    )
    assert "no bucket can have this name" in await refusal(server, s3_bucket_name="a/b")


async def test_credentials_are_seen_to_be_right(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with credentials_count() as (key_id, secret):
        assert "the credentials are refused (InvalidAccessKeyId)" in await refusal(server)
        monkeypatch.setenv("SGLD_S3_ACCESS_KEY_ID", key_id)
        assert "the credentials are refused (SignatureDoesNotMatch)" in await refusal(server)
        monkeypatch.setenv("SGLD_S3_SECRET_ACCESS_KEY", secret)
        async with open_bucket(server.config()) as bucket:
            await bucket.upload("small.png", small(tmp_path), "image/png")
            assert await bucket.read("small.png") == b"a picture"


async def test_a_server_that_isnt_there_is_told_at_once(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_ATTEMPTS", 1)
    server.stop()

    assert f"{server.url} can't be reached" in await refusal(server)


async def test_there_must_be_credentials(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SGLANG_S3_ACCESS_KEY_ID")
    monkeypatch.delenv("SGLD_S3_SECRET_ACCESS_KEY")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))

    assert "there are no credentials: set SGLD_S3_ACCESS_KEY_ID" in await refusal(server)
