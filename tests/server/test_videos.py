"""/v1/videos of a real server, with OpenAI's own client where it has a method for it."""

from io import BytesIO
from pathlib import Path
from typing import Any

import anyio
import av
import httpx2
import numpy as np
import openai
import pytest
from blockbuster import blockbuster_ctx
from openai import AsyncOpenAI
from PIL import Image
from pipelines import build

from sgld.config import ServerConfig
from sgld.media.animations import MAX_GIF_PIXELS
from sgld.media.metadata import read_metadata
from sgld.server.bodies import data_url

from .fakes import FakeEngine, Running, running
from .test_edits import png, upload
from .test_images import error_of
from .test_jobs import content_of
from .test_pipelines import serving

# OpenAI has shut its own videos down.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FRAMES = {"num_frames": 5, "fps": 8}


def client_of(server: Running, api_key: str = "none") -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key=api_key, max_retries=0)


async def create(server: Running, prompt: str = "a cat", **fields: Any) -> dict[str, Any]:
    answer = await server.http.post("/v1/videos", json={"prompt": prompt, **FRAMES, **fields})
    assert answer.status_code == 200, answer.text
    video: dict[str, Any] = answer.json()
    return video


async def ended(server: Running, video: dict[str, Any]) -> dict[str, Any]:
    """The video, when it has an end."""
    if (job := await server.services.jobs.wait_running(video["id"])) is not None:
        await job.ended.wait()
    found: dict[str, Any] = (await server.http.get(f"/v1/videos/{video['id']}")).json()
    return found


def frames_of(content: bytes) -> list[Any]:
    with av.open(BytesIO(content)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


async def test_openais_client_makes_a_video_with_a_real_pipeline(tmp_path: Path) -> None:
    pipeline, kwargs = build("wan")
    extra = {"num_frames": 9, "num_inference_steps": 2, "max_sequence_length": kwargs["max_sequence_length"]}
    async with running(tmp_path, factory=serving(pipeline)) as server, client_of(server) as client:
        video = await client.videos.create_and_poll(
            prompt="a red cat",
            size="16x16",  # type: ignore[arg-type]
            extra_body={**extra, "n": 2, "seed": 3},
        )
        content = await (await client.videos.download_content(video.id)).aread()
        second = (await server.http.get(f"/v1/videos/{video.id}/content?variant=1")).content
        sheet = await (await client.videos.download_content(video.id, variant="spritesheet")).aread()
        thumbnail = await (await client.videos.download_content(video.id, variant="thumbnail")).aread()

    assert (video.status, video.progress, video.size, video.error) == ("completed", 100, "16x16", None)
    assert len(frames_of(content)) == 9
    assert content != second
    assert Image.open(BytesIO(sheet)).size == (4 * 16, 3 * 16)
    assert Image.open(BytesIO(thumbnail)).size == (16, 16)
    (tmp_path / "video.mp4").write_bytes(content)
    assert read_metadata(tmp_path / "video.mp4")["params"]["prompt"] == "a red cat"


async def test_a_picture_begins_a_video_of_a_real_pipeline(tmp_path: Path) -> None:
    pipeline, _ = build("wan_i2v")
    fields = {"prompt": "a cat", "size": "16x16", "num_frames": "9", "num_inference_steps": "2", "seed": "3"}
    fields["max_sequence_length"] = "16"
    async with running(tmp_path, factory=serving(pipeline)) as server:
        contents = []
        for color in ("red", "blue"):
            files = [upload("input_reference", png((16, 16), color=color))]
            video = (await server.http.post("/v1/videos", data=fields, files=files)).json()
            video = await ended(server, video)
            assert video["error"] is None
            contents.append((await server.http.get(video["url"])).content)

    red, blue = (np.asarray(frames_of(content)).astype(int) for content in contents)
    assert np.abs(red - blue).max() > 0


async def test_a_video_is_answered_before_it_is_made(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        answer = await server.http.post("/v1/videos", json={"prompt": "wait", **FRAMES, "size": "32x16", "seed": 3})
        await server.engine.hanging.wait()
        content = await server.http.get(f"/v1/videos/{answer.json()['id']}/content")
        await anyio.wait_all_tasks_blocked()
        on_its_way = await server.http.get(f"/v1/videos/{answer.json()['id']}")
        server.engine.go.set()
        video = await ended(server, answer.json())

    assert answer.json()["status"] == "queued"
    assert answer.headers["openai-poll-after-ms"] == "1000"
    assert (on_its_way.json()["status"], on_its_way.json()["progress"]) == ("in_progress", 25)
    assert (content.status_code, error_of(content)["code"]) == (404, "video_not_ready")
    assert (video["status"], video["progress"], video["size"]) == ("completed", 100, "32x16")
    assert (video["object"], video["seconds"], video["seed"]) == ("video", "0.625", 3)
    assert video["expires_at"] > video["completed_at"] >= video["created_at"]


async def test_a_part_of_a_video_can_be_fetched(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        video = await ended(server, await create(server))
        whole = await server.http.get(video["url"])
        part = await server.http.get(video["url"], headers={"range": "bytes=4-11"})

    assert (part.status_code, part.content) == (206, whole.content[4:12])
    assert whole.headers["content-type"] == "video/mp4"


async def test_a_failed_video_is_told_with_200(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client_of(server) as client:
        video = await client.videos.create_and_poll(prompt="fail out_of_memory", extra_body=FRAMES)
        with pytest.raises(openai.NotFoundError, match="it broke"):
            await client.videos.download_content(video.id)

    assert video.status == "failed"
    assert video.error is not None
    assert (video.error.code, video.error.message) == ("out_of_memory", "it broke")


async def test_a_model_of_pictures_makes_no_video(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        answer = await server.http.post("/v1/videos", json={"prompt": "picture"})
        video = await ended(server, answer.json())

    assert video["error"]["code"] == "pipeline_failed"
    assert "/v1/images" in video["error"]["message"]


async def test_what_no_file_of_the_format_holds_is_refused_before_it_is_made(tmp_path: Path) -> None:
    large = {"prompt": "hang", "num_frames": 400, "size": "2048x2048"}
    async with running(tmp_path) as server:
        answers = [await server.http.post("/v1/videos", json=large | {"output_format": f}) for f in ("gif", "mp4")]
        assert [answer.status_code for answer in answers] == [400, 200]
        assert answers[0].json()["error"]["param"] == "output_format"


async def test_limits_of_a_file_reach_the_rank_that_knows_what_the_model_chooses(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        await server.http.post("/v1/videos", json={"prompt": "a cat", "output_format": "gif", "num_frames": 2})
        [limits] = server.engine.limits
        assert (limits.only_videos, limits.max_total_pixels) == (True, MAX_GIF_PIXELS)
        assert limits.max_steps == ServerConfig().max_steps


@pytest.mark.parametrize(
    ("fields", "num_frames", "fps"),
    [
        ({"seconds": "4"}, 96, 24.0),
        ({"seconds": 0.5, "fps": 8}, 4, 8.0),
        ({"seconds": "4", "num_frames": 7}, 7, None),
        ({"num_frames": 7, "fps": 10}, 7, 10.0),
        ({}, None, None),
    ],
)
async def test_lengths(tmp_path: Path, fields: dict[str, Any], num_frames: int | None, fps: float | None) -> None:
    async with running(tmp_path) as server:
        await server.http.post("/v1/videos", json={"prompt": "hang", **fields})
        form = {name: str(value) for name, value in fields.items()}
        await server.http.post("/v1/videos", data={"prompt": "hang", **form}, files=[])

    assert [(params.num_frames, params.fps) for params in server.engine.params] == [(num_frames, fps)] * 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a cat", "seconds": "long"}, "seconds"),
        ({"prompt": "a cat", "seconds": -1}, "seconds"),
        ({"prompt": "a cat", "seconds": 1e9}, "seconds"),
        ({"prompt": "a cat", "seconds": 1e300}, "seconds"),
        ({"prompt": "a cat", "num_frames": 513}, "num_frames"),
        ({"prompt": "a cat", "n": 11}, "n"),
        ({"prompt": "a cat", "size": "wide"}, "size"),
        ({"prompt": "a cat", "second": 3}, "second"),
        ({"prompt": "a cat", "video_url": "http://example.org/a.mp4"}, "video_url"),
        ({"prompt": "a cat", "input_reference": {"path": "a"}}, "input_reference"),
        ({"prompt": "a cat", "input_reference": {"file_id": "file-1"}}, "file_id"),
        ({"prompt": "a cat", "input_reference": "data:;base64,AAAA"}, "input_reference"),
    ],
)
async def test_what_can_not_be_done_is_said(tmp_path: Path, fields: dict[str, Any], param: str) -> None:
    async with running(tmp_path) as server:
        answer = await server.http.post("/v1/videos", json=fields)
        listed = (await server.http.get("/v1/videos")).json()

    assert (answer.status_code, error_of(answer)["param"]) == (400, param)
    assert listed["data"] == []


async def test_files_of_the_server_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    async with running(tmp_path) as server:
        answer = await server.http.post(
            "/v1/videos", json={"prompt": "a cat", "input_reference": str(tmp_path / "secret.png")}
        )

    assert answer.status_code == 400
    assert server.engine.params == []


async def test_the_first_picture_comes_in_many_ways(tmp_path: Path) -> None:
    url = data_url(png())
    async with running(tmp_path) as server, client_of(server) as client:
        image = (await server.post(prompt="a cat", size="8x6")).json()
        stored = (await server.http.get(f"/v1/images/{image['id']}/content")).content
        await client.videos.create(prompt="hang", input_reference=("a.png", png(), "image/png"))
        for nested in ({"image_url": url}, {"file_id": image["id"]}):
            ((name, value),) = nested.items()
            form = {"prompt": "hang", f"input_reference[{name}]": value}
            assert (await server.http.post("/v1/videos", data=form)).status_code == 200
        await create(server, "hang", input_reference=url)
        await create(server, "hang", reference_url=url)
        await create(server, "hang", input_reference={"image_url": url})
        pictures = [content_of(params.image_path[0]) for params in server.engine.params[1:]]

    assert pictures == [png(), png(), stored, png(), png(), png()]


async def test_a_refusal_has_a_status_and_leaves_no_video(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        answer = await server.http.post("/v1/videos", json={"prompt": "refuse queue_full"})
        listed = (await server.http.get("/v1/videos")).json()

    assert (answer.status_code, error_of(answer)["code"]) == (429, "queue_full")
    assert listed == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


async def test_videos_are_listed_page_by_page(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client_of(server) as client:
        made = [(await create(server, "hang"))["id"] for _ in range(5)]
        newest = [video.id async for video in client.videos.list(limit=2)]
        oldest = [video.id async for video in client.videos.list(limit=2, order="asc", after=made[1])]
        page = (await server.http.get("/v1/videos?limit=5")).json()
        queries = ("limit=0", "limit=101", "order=up", "limit=" + "9" * 5000)
        wrong = [await server.http.get(f"/v1/videos?{query}") for query in queries]

    assert newest == made[::-1]
    assert oldest == made[2:]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (made[4], made[0], False)
    assert [answer.status_code for answer in wrong] == [400] * 4


async def test_a_deleted_video_is_gone_with_its_work(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client_of(server) as client:
        video = await create(server, "hang")
        await server.engine.hanging.wait()
        deleted = await client.videos.delete(video["id"])
        with pytest.raises(openai.NotFoundError):
            await client.videos.retrieve(video["id"])

        assert server.engine.ended == ["hang"]
    assert deleted.model_dump() == {"id": video["id"], "object": "video.deleted", "deleted": True}


async def test_a_cancelled_video_ends_the_polling_of_openais_client(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client_of(server) as client, anyio.create_task_group() as tasks:
        video = await create(server, "hang")
        polled: list[Any] = []

        async def poll() -> None:
            polled.append(await client.videos.poll(video["id"], poll_interval_ms=20))

        tasks.start_soon(poll)
        await server.engine.hanging.wait()
        answer = await server.http.post(f"/v1/videos/{video['id']}/cancel")
        again = await server.http.post(f"/v1/videos/{video['id']}/cancel")

    assert answer.json() == again.json()
    assert (answer.json()["status"], answer.json()["error"]["code"]) == ("failed", "cancelled")
    assert polled[0].status == "failed"


async def test_a_request_that_is_deleted_is_a_cancelled_video(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        video = await create(server, "hang")
        await server.engine.hanging.wait()
        await server.http.delete(f"/v1/requests/{video['id']}")
        cancelled = await ended(server, video)
        shown = [status["id"] for status in (await server.http.get("/v1/requests")).json()["data"]]
        await server.http.delete(f"/v1/videos/{video['id']}")
        after = (await server.http.get("/v1/requests")).json()["data"]
    async with running(tmp_path) as server:
        listed = (await server.http.get("/v1/videos")).json()["data"]

    assert cancelled["error"]["code"] == "cancelled"
    assert shown == [video["id"]]
    assert after == listed == []


async def test_a_remix_is_the_same_with_another_prompt(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client_of(server) as client:
        video = await create(server, seed=5, input_reference=data_url(png()), n=2)
        remix = await client.videos.remix(video["id"], prompt="a dog")
        refused = await server.http.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "a", "seed": 1})
        await server.http.delete(f"/v1/videos/{video['id']}")
        first, second = server.engine.params[:2]

        assert content_of(second.image_path[0]) == png()
    assert remix.remixed_from_video_id == video["id"]
    assert (second.prompt, second.seed, second.num_frames, second.num_outputs_per_prompt) == ("a dog", 5, 5, 2)
    assert first.image_path != second.image_path
    assert error_of(refused)["param"] == "seed"


async def test_each_key_sees_its_own_videos(tmp_path: Path) -> None:
    async with running(tmp_path, api_key=("a", "b")) as server:
        mine = {"authorization": "Bearer a"}
        video = (await server.http.post("/v1/videos", json={"prompt": "hang"}, headers=mine)).json()
        theirs = {"authorization": "Bearer b"}
        path = f"/v1/videos/{video['id']}"
        asked = [("GET", ""), ("GET", "/content"), ("GET", "/events"), ("GET", "/stream"), ("DELETE", "")]
        asked += [("POST", "/cancel"), ("POST", "/remix")]
        answers = [await server.http.request(method, path + end, headers=theirs) for method, end in asked]
        listed = (await server.http.get("/v1/videos", headers=theirs)).json()
        found = await server.http.get(path, headers=mine)

    assert [answer.status_code for answer in answers] == [404] * len(asked)
    assert listed["data"] == []
    assert found.status_code == 200


async def test_an_idempotency_key_makes_one_video(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        headers = {"idempotency-key": "k"}
        first = await server.http.post("/v1/videos", json={"prompt": "a cat"}, headers=headers)
        form = await server.http.post("/v1/videos", data={"prompt": "a cat"}, files=[], headers=headers)
        other = await server.http.post("/v1/videos", json={"prompt": "a dog"}, headers=headers)
        too_long = await server.http.post("/v1/videos", json={"prompt": "a"}, headers={"idempotency-key": "k" * 256})
    async with running(tmp_path) as server:
        again = await server.http.post("/v1/videos", json={"prompt": "a cat"}, headers=headers)

    assert first.json()["id"] == form.json()["id"] == again.json()["id"]
    assert (other.status_code, error_of(other)["code"]) == (422, "idempotency_key_reused")
    assert too_long.status_code == 400


async def test_a_picture_with_a_key_is_made_once_though_the_client_leaves(tmp_path: Path) -> None:
    headers = {"idempotency-key": "k"}
    fields = {"prompt": "wait", "n": 2, "size": "16x16"}
    engine = FakeEngine()
    async with running(tmp_path, engine) as server:
        async with anyio.create_task_group() as tasks:

            async def ask() -> None:
                await server.http.post("/v1/images/generations", json=fields, headers=headers)

            tasks.start_soon(ask)
            await engine.hanging.wait()
            tasks.cancel_scope.cancel()
        engine.go.set()
        second = await server.http.post("/v1/images/generations", json=fields, headers=headers)
        third = await server.http.post("/v1/images/generations", json=fields, headers=headers)
    async with running(tmp_path) as server:
        fourth = await server.http.post("/v1/images/generations", json=fields, headers=headers)
        stream = await server.http.post("/v1/images/generations", json={**fields, "stream": True}, headers=headers)
        content = await server.http.get(f"/v1/images/{second.json()['id']}/content")

    answers = [answer.json() for answer in (second, third, fourth)]
    assert [answer["data"] for answer in answers] == [answers[0]["data"]] * 3
    assert len({answer["id"] for answer in answers}) == 1
    assert len(engine.params) == 1
    assert content.status_code == 200
    assert stream.status_code == 422


async def test_a_stream_with_a_key_is_found_again(tmp_path: Path) -> None:
    headers = {"idempotency-key": "k"}
    fields = {"prompt": "a cat", "n": 2, "stream": True, "partial_images": 1}
    async with running(tmp_path) as server:
        first = await server.http.post("/v1/images/generations", json=fields, headers=headers)
        second = await server.http.post("/v1/images/generations", json=fields, headers=headers)

    def completed(answer: httpx2.Response) -> list[str]:
        return [event for event in answer.text.split("\n\n") if event.startswith("event: image_generation.completed")]

    assert len(completed(first)) == 2
    assert completed(first) == completed(second)
    assert "partial_image" in first.text


@pytest.mark.parametrize(("prompt", "status"), [("fail out_of_memory", 500), ("fail invalid_request", 400)])
async def test_a_failure_with_a_key_is_the_same_again(tmp_path: Path, prompt: str, status: int) -> None:
    async with running(tmp_path) as server:
        headers = {"idempotency-key": "k"}
        answers = [
            await server.http.post("/v1/images/generations", json={"prompt": prompt}, headers=headers) for _ in range(2)
        ]

    assert [answer.status_code for answer in answers] == [status] * 2
    assert len(server.engine.params) == 1


async def test_a_picture_that_nobody_waits_for_is_a_job(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        accepted = await server.post(prompt="hang", wait=False, size="16x16", seed=3)
        await server.engine.hanging.wait()
    engine = FakeEngine()
    async with running(tmp_path, engine) as server:
        job = await server.services.jobs.wait_running(accepted.json()["id"])

        assert job is not None
        assert (job.live.params.prompt, job.live.params.seed) == ("hang", 3)


async def test_nothing_blocks_the_event_loop(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        with blockbuster_ctx():
            video = await create(server, input_reference=data_url(png()), size="256x256")
            video = await ended(server, video)
            content = await server.http.get(video["url"])
            listed = await server.http.get("/v1/videos")
            stream = await server.http.get(f"/v1/videos/{video['id']}/stream")
            gone = await server.http.delete(f"/v1/videos/{video['id']}")

    assert [answer.status_code for answer in (content, listed, stream, gone)] == [200] * 4


@pytest.mark.parametrize(("output_format", "kind"), [("gif", "GIF"), ("webp", "WEBP")])
async def test_a_short_video_may_be_an_animated_picture(tmp_path: Path, output_format: str, kind: str) -> None:
    async with running(tmp_path) as server:
        video = await ended(server, await create(server, output_format=output_format))
        content = await server.http.get(video["url"])
        thumbnail = await server.http.get(f"/v1/videos/{video['id']}/content?variant=thumbnail")

    assert content.headers["content-type"] == f"image/{output_format}"
    assert Image.open(BytesIO(content.content)).format == kind
    assert thumbnail.headers["content-type"] == "image/webp"


async def test_the_encoder_can_be_chosen(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        video = await ended(server, await create(server, video_codec="hevc", video_crf=30, x264_preset="fast"))
        content = (await server.http.get(video["url"])).content
        bad = await server.http.post("/v1/videos", json={"prompt": "a", **FRAMES, "video_crf": 60})
        sound = await server.http.post("/v1/videos", data={"prompt": "a", "video_codec": "av1", "x264_preset": "fast"})

    with av.open(BytesIO(content)) as container:
        assert container.streams.video[0].codec_context.name == "hevc"
    assert (bad.status_code, error_of(bad)["param"]) == (400, "video_crf")
    assert (sound.status_code, error_of(sound)["param"]) == (400, "x264_preset")
