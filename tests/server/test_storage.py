"""Results that go to a bucket, as clients see them."""

import logging
import signal
from base64 import b64decode
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
from anyio.to_thread import run_sync
from openai import AsyncOpenAI
from storage.s3_server import BUCKET, S3Server

from sgld.logs import set_up_logs
from sgld.media.metadata import read_metadata
from sgld.storage import cloud, s3
from sgld.storage.cloud import CloudStorage
from sgld.storage_config import StorageConfig

from .fakes import TIMEOUT_S, Running, running
from .test_serve import program
from .test_videos import create, ended, frames_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SECRET = "a-secret-that-nobody-may-see"


@pytest.fixture
def bucket(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    monkeypatch.setenv("SGLD_S3_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("SGLD_S3_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setattr(s3, "_ATTEMPTS", 1)
    monkeypatch.setattr(cloud, "PAUSES_S", (0.01,))
    return bucket


def storage_of(server: Running) -> CloudStorage:
    storage = server.services.jobs.storage
    assert isinstance(storage, CloudStorage)
    return storage


async def test_a_picture_is_in_the_bucket_and_its_url_leads_there(bucket: S3Server, tmp_path: Path) -> None:
    settings = bucket.config(s3_key_prefix="made/")
    async with running(tmp_path, storage=settings) as server, httpx2.AsyncClient(follow_redirects=True) as http:
        made = (await server.post(prompt="a cat", n=2, response_format="url", seed=3)).json()
        urls = [picture["url"] for picture in made["data"]]
        pictures = [(await http.get(url)).content for url in urls]
        redirected = await server.http.get(f"/v1/images/{made['id']}/content?variant=1")
        again = (await server.http.get(f"/v1/images/{made['id']}")).json()
        names = list(bucket.objects)
        deleted = await server.http.delete(f"/v1/images/{made['id']}")
        page = await server.http.get("/")

    assert all(url.startswith(f"{bucket.url}/{BUCKET}/made/img_") and "X-Amz-Signature" in url for url in urls)
    (tmp_path / "0.png").write_bytes(pictures[0])
    assert read_metadata(tmp_path / "0.png")["params"]["seed"] == 3
    assert redirected.status_code == 302
    assert redirected.headers["location"].startswith(f"{bucket.url}/{BUCKET}/made/{made['id']}/1-0.png?")
    assert again["data"][0]["url"].startswith(f"{bucket.url}/{BUCKET}/")
    assert names == [f"made/{made['id']}/{index}-0.png" for index in (0, 1)]
    assert not list((tmp_path / "data" / "results").rglob("*.png"))
    assert deleted.json()["deleted"]
    assert bucket.objects == {}
    assert f"img-src 'self' data: {bucket.url};" in page.headers["content-security-policy"]


async def test_openais_client_gets_a_video_from_the_bucket(bucket: S3Server, tmp_path: Path) -> None:
    """With a key of this server, which it must not show to the bucket."""
    async with (
        running(tmp_path, storage=bucket.config(), api_key=("mine",)) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="mine", max_retries=0) as client,
    ):
        video = await client.videos.create_and_poll(prompt="a cat", extra_body={"num_frames": 5, "fps": 8})
        content = await (await client.videos.download_content(video.id)).aread()
        thumbnail = await (await client.videos.download_content(video.id, variant="thumbnail")).aread()
        found = (await client.videos.retrieve(video.id)).model_dump()
        listed = (await client.videos.list()).model_dump()["data"][0]
        objects = {name.partition("/")[2]: kept.metadata["Content-Type"] for name, kept in bucket.objects.items()}
        await client.videos.delete(video.id)

    assert len(frames_of(content)) == 5
    assert thumbnail[8:12] == b"WEBP"
    assert found["url"].startswith(f"{bucket.url}/{BUCKET}/{video.id}/0.mp4?")
    assert listed["urls"][0].startswith(f"{bucket.url}/{BUCKET}/{video.id}/0.mp4?")
    assert objects == {
        "0.mp4": "video/mp4",
        "0-spritesheet.jpg": "image/jpeg",
        "0-thumbnail.webp": "image/webp",
    }
    assert bucket.objects == {}


async def test_a_fragmented_video_is_uploaded_while_it_is_encoded(bucket: S3Server, tmp_path: Path) -> None:
    async with running(tmp_path, storage=bucket.config()) as server:
        video = await ended(server, await create(server, video_fragmented=True))
        async with httpx2.AsyncClient() as http:
            content = (await http.get(video["url"])).content

    assert len(frames_of(content)) == 5
    # An object that was made in parts.
    assert bucket.objects[f"{video['id']}/0.mp4"].etag.strip('"').endswith("-1")


async def test_a_bucket_that_is_away_is_no_failure_of_a_request(bucket: S3Server, tmp_path: Path) -> None:
    async with running(tmp_path, storage=bucket.config()) as server:
        await run_sync(bucket.stop)
        made = (await server.post(prompt="a cat", response_format="url")).json()
        video = await ended(server, await create(server))
        local = await server.http.get(made["data"][0]["url"])
        told = (await server.http.get("/server_info")).json()["storage"]
        await run_sync(bucket.start)
        await storage_of(server).wait_settled()
        later = (await server.http.get(f"/v1/images/{made['id']}")).json()
        video_later = (await server.http.get(f"/v1/videos/{video['id']}")).json()

    told_of = [made["data"][0], video, later["data"][0], video_later]
    assert [one["upload"] for one in told_of] == ["pending", "pending", "uploaded", "uploaded"]
    assert made["data"][0]["url"].startswith(f"{server.url}/v1/images/")
    assert (local.status_code, local.headers["content-type"]) == (200, "image/png")
    assert video["status"] == "completed"
    assert video["url"].startswith(f"{server.url}/v1/videos/")
    assert told == {"cloud": True, "num_pending_files": 4}
    assert later["data"][0]["url"].startswith(f"{bucket.url}/{BUCKET}/")
    assert video_later["url"].startswith(f"{bucket.url}/{BUCKET}/")
    assert bucket.objects[f"{made['id']}/0-0.png"].value == local.content


async def test_results_that_expire_are_removed_from_the_bucket(bucket: S3Server, tmp_path: Path) -> None:
    async with running(tmp_path, storage=bucket.config(), result_max_bytes=0) as server:
        await server.post(prompt="a cat")
        assert bucket.objects
        await server.services.jobs.sweep()

    assert bucket.objects == {}


async def test_a_job_that_is_read_again_comes_from_the_bucket(bucket: S3Server, tmp_path: Path) -> None:
    headers, body = {"idempotency-key": "1"}, {"prompt": "a cat", "seed": 1}
    async with running(tmp_path, storage=bucket.config()) as server:
        first = await server.http.post("/v1/images/generations", json=body, headers=headers)
        again = await server.http.post("/v1/images/generations", json=body, headers=headers)
        await run_sync(bucket.stop)
        away = await server.http.post("/v1/images/generations", json=body, headers=headers)

    assert first.json()["data"] == again.json()["data"]
    assert (away.status_code, away.json()["error"]["code"]) == (503, "storage_error")
    assert bucket.url not in away.text


async def test_a_client_that_leaves_leaves_no_file(bucket: S3Server, tmp_path: Path) -> None:
    bucket.hold = lambda request: request.startswith("PUT")
    async with running(tmp_path, storage=bucket.config()) as server:
        body = {"prompt": "a cat", "stream": True}
        async with server.http.stream("POST", "/v1/images/generations", json=body):
            await run_sync(bucket.held.wait, abandon_on_cancel=True)
        bucket.go.set()
        await server.services.requests.wait_idle()
        await storage_of(server).wait_settled()

        assert bucket.objects == {}
        assert not list((tmp_path / "data" / "results").iterdir())


async def test_secrets_are_nowhere_to_be_seen(
    bucket: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path, storage=bucket.config(), log_level="debug") as server:
        with caplog.at_level(logging.DEBUG):
            set_up_logs("debug", "text")
            made = await server.post(prompt="a cat")
            await run_sync(bucket.stop)
            kept = await server.post(prompt="a cat", response_format="url")
        file = (await server.http.get(kept.json()["data"][0]["url"])).content
        shown = [(await server.http.get(path)).text for path in ("/server_info", "/metrics", "/openapi.json")]
        shown += [made.text, repr(server.services.config), msgspec.json.encode(server.services.config).decode()]

    assert any("can't be reached" in record.getMessage() for record in caplog.records)
    assert SECRET not in caplog.text
    assert "Signature=" not in caplog.text
    assert not [text for text in shown if SECRET in text]
    assert SECRET.encode() not in file
    assert bucket.url.encode() not in file


def mark(path: Path, media_type: str) -> None:
    path.write_bytes(path.read_bytes() + media_type.encode())


async def test_the_operators_hook_sees_each_file_before_anybody_else(tmp_path: Path) -> None:
    settings = StorageConfig(output_hook="server.test_storage:mark")
    async with running(tmp_path, storage=settings) as server:
        picture = (await server.post(prompt="a cat")).json()
        content = (await server.http.get(f"/v1/images/{picture['id']}/content")).content
        video = await ended(server, await create(server))
        film = (await server.http.get(video["url"])).content

    assert content.endswith(b"image/png")
    assert b64decode(picture["data"][0]["b64_json"]) == content
    assert film.endswith(b"video/mp4")


def test_a_server_that_is_killed_while_it_uploads_goes_on_when_it_is_back(bucket: S3Server, tmp_path: Path) -> None:
    flags = ["--cloud-storage-type", "s3", "--s3-bucket-name", BUCKET, "--s3-endpoint-url", bucket.url]
    body: dict[str, Any] = {"prompt": "a cat", "num_frames": 5, "fps": 8}
    bucket.hold = lambda request: request.startswith("PUT")
    with program(tmp_path, *flags) as (process, url), httpx2.Client(base_url=url, timeout=TIMEOUT_S) as client:
        video = client.post("/v1/videos", json=body).json()["id"]
        assert bucket.held.wait(TIMEOUT_S)
        process.send_signal(signal.SIGKILL)
        process.wait(TIMEOUT_S)
    assert bucket.objects == {}
    assert len(list((tmp_path / "results" / video).iterdir())) == 1
    bucket.hold = lambda request: False
    bucket.drop()

    with program(tmp_path, *flags) as (_, url), httpx2.Client(base_url=url, timeout=TIMEOUT_S) as client:
        events = client.get(f"/v1/videos/{video}/events").text
        content = client.get(f"/v1/videos/{video}/content", follow_redirects=True)

    assert "event: completed" in events
    assert len(frames_of(content.content)) == 5
    assert content.url.host == "127.0.0.1"
    assert str(content.url).startswith(bucket.url)
    assert len(bucket.objects) == 3
