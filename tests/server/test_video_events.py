"""Videos while they are made."""

import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import anyio
import httpx2
import msgspec
import pytest
from PIL import Image
from pipelines import build

from sgld.media.inputs import InputPolicy
from sgld.server.errors import ApiError
from sgld.server.requests import Requests
from sgld.server.video_events import growing

from .fakes import FakeEngine, Running, running
from .test_images import error_of
from .test_pipelines import serving
from .test_requests import submit
from .test_videos import create, ended, frames_of


def parsed(block: str) -> tuple[str | None, dict[str, Any]]:
    """The id and the data of an event."""
    lines = dict(line.split(": ", 1) for line in block.splitlines())
    data: dict[str, Any] = msgspec.json.decode(lines["data"])
    assert data["type"] == lines["event"]
    return lines.get("id"), data


async def events_of(server: Running, video_id: str, **headers: str) -> list[tuple[str | None, dict[str, Any]]]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await server.http.get(f"/v1/videos/{video_id}/events", headers=named)
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [parsed(block) for block in answer.text.strip().split("\n\n")]


async def read_until(response: httpx2.Response, pattern: bytes) -> bytes:
    content = b""
    async for chunk in response.aiter_raw():
        content += chunk
        if re.search(pattern, content):
            return content
    raise AssertionError(content)


async def test_events_tell_how_a_video_is_made(tmp_path: Path) -> None:
    pipeline, kwargs = build("wan")
    fields: dict[str, Any] = {"size": "16x16", "num_frames": 9, "num_inference_steps": 3, "partial_images": 1}
    async with running(tmp_path, factory=serving(pipeline)) as server:
        video = await create(server, **fields, max_sequence_length=kwargs["max_sequence_length"])
        events = [data for _, data in await events_of(server, video["id"])]
        late = await events_of(server, video["id"])
        again = await server.http.get(f"/v1/videos/{video['id']}/events", headers={"last-event-id": late[0][0] or ""})

    kinds = [event["type"] for event in events]
    frames = [event for event in events if event["type"] == "frames"]
    assert kinds[:2] == ["queued", "started"]
    assert kinds[-1] == "completed"
    assert "progress" in kinds
    assert sum(len(event["b64_webp"]) for event in frames) == 9
    assert [event["index"] for event in frames] == sorted(event["index"] for event in frames)
    assert Image.open(BytesIO(b64decode(frames[0]["b64_webp"][0]))).size == (16, 16)
    assert events[-1]["video"]["status"] == "completed"
    assert [data["type"] for _, data in late] == ["completed"]
    # What keeps a browser from asking again.
    assert again.status_code == 204


async def test_who_comes_back_hears_what_is_new(tmp_path: Path) -> None:
    async with running(tmp_path, heartbeat_s=0.05) as server:
        video = await create(server, "pause", num_frames=4)
        path = f"/v1/videos/{video['id']}/events"
        async with server.http.stream("GET", path) as response:
            heard = await read_until(response, rb"event: frames\n(.+\n)+\n")
        last_id, _ = parsed(next(block for block in heard.decode().split("\n\n") if "event: frames" in block))
        async with server.http.stream("GET", path, headers={"last-event-id": last_id or ""}) as response:
            chunks = response.aiter_raw()
            # Silence: there is nothing new.
            text = await anext(chunks)
            assert text == b": ping\n"
            server.engine.go.set()
            text += b"".join([chunk async for chunk in chunks])
        other = await server.http.get(path, headers={"last-event-id": "abcd-1000"})

    blocks = text.decode().replace(": ping\n", "").strip().split("\n\n")
    news = [parsed(block)[1] for block in blocks if "type" in block]
    assert [event["index"] for event in news if event["type"] == "frames"] == [2]
    assert {event["type"] for event in news} <= {"frames", "completed"}
    assert "completed" in other.text


async def test_a_failure_is_the_last_event(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        video = await create(server, "fail out_of_memory")
        events = await events_of(server, video["id"])

    assert events[-1][1]["video"]["error"]["code"] == "out_of_memory"


async def test_a_server_that_leaves_says_so(tmp_path: Path) -> None:
    async with running(tmp_path) as server, anyio.create_task_group() as tasks:
        video = await create(server, "hang")
        blocks: list[str] = []

        async def listen() -> None:
            answer = await server.http.get(f"/v1/videos/{video['id']}/events")
            blocks.extend(answer.text.strip().split("\n\n"))

        tasks.start_soon(listen)
        await server.engine.hanging.wait()
        server.services.stopping.set()

    assert '"code":"shutting_down"' in blocks[-1]


async def test_a_video_plays_while_it_is_decoded(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        video = await create(server, "pause", num_frames=8, seed=90, size="32x16")
        await server.engine.hanging.wait()
        async with server.http.stream("GET", f"/v1/videos/{video['id']}/stream") as response:
            kind = response.headers["content-type"]
            early = b""
            chunks = response.aiter_raw()
            async for chunk in chunks:
                early += chunk
                if early.count(b"moof") >= 3:
                    break
            playable = len(frames_of(early))
            # Somebody who comes now gets it from its first frame on, too.
            async with server.http.stream("GET", f"/v1/videos/{video['id']}/stream") as late_response:
                server.engine.go.set()
                late = await late_response.aread()
            whole = early + b"".join([chunk async for chunk in chunks])
        await ended(server, video)
        stored = await server.http.get(f"/v1/videos/{video['id']}/stream")

    assert kind == "video/mp4"
    assert playable >= 3
    assert [len(frames_of(content)) for content in (whole, late, stored.content)] == [8, 8, 8]
    assert abs(int(frames_of(whole)[-1].mean()) - 90) <= 2


async def test_a_stream_of_the_real_pipeline_has_all_frames(tmp_path: Path) -> None:
    pipeline, kwargs = build("wan")
    fields: dict[str, Any] = {"size": "16x16", "num_frames": 9, "num_inference_steps": 2, "n": 2}
    async with running(tmp_path, factory=serving(pipeline)) as server:
        video = await create(server, **fields, max_sequence_length=kwargs["max_sequence_length"])
        contents = [
            (await server.http.get(f"/v1/videos/{video['id']}/stream?index={index}")).content for index in (0, 1)
        ]
        none = await server.http.get(f"/v1/videos/{video['id']}/stream?index=2")

    assert [len(frames_of(content)) for content in contents] == [9, 9]
    assert none.status_code == 404


async def test_a_failure_before_the_first_frame_is_an_error() -> None:
    async with Requests(FakeEngine(), InputPolicy()) as requests:
        live = await submit(requests, "fail out_of_memory")
        with pytest.raises(ApiError, match="it broke") as caught:
            await anext(growing(live, 0, fps=8, quality=90))

    assert caught.value.status == 500


async def test_a_stream_of_a_failed_video_is_not_there(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        video = await create(server, "fail out_of_memory")
        await ended(server, video)
        answer = await server.http.get(f"/v1/videos/{video['id']}/stream")

    assert (answer.status_code, error_of(answer)["code"]) == (404, "video_failed")
