"""/v1/images of a real server with an engine that paints its seed."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import anyio
import msgspec
import numpy as np
import pytest
from blockbuster import blockbuster_ctx
from PIL import Image

from sgld.server.auth import ANYBODY
from sgld.storage.local import LocalStorage

from .fakes import FakeEngine, running


def picture(b64: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(b64)))


def error_of(response: Any) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return error


async def test_a_picture_comes_in_openais_shape(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        answer = (await server.post(prompt="a cat", size="32x16", seed=7)).json()

    assert answer["size"] == "32x16"
    assert answer["output_format"] == "png"
    assert answer["usage"]["total_tokens"] == 0
    image = picture(answer["data"][0]["b64_json"])
    assert (np.asarray(image) == 7).all()
    assert msgspec.json.decode(str(image.info["sgld"]))["params"]["prompt"] == "a cat"


async def test_a_picture_may_be_avif(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        answer = (await server.post(prompt="a cat", size="32x16", output_format="avif")).json()
        content = await server.http.get(f"/v1/images/{answer['id']}/content")

    assert answer["output_format"] == "avif"
    assert picture(answer["data"][0]["b64_json"]).format == "AVIF"
    assert content.headers["content-type"] == "image/avif"


async def test_several_pictures_have_seeds_that_count_up(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        data = (await server.post(prompt="a cat", n=3, seed=7)).json()["data"]

    assert [entry["seed"] for entry in data] == [7, 8, 9]
    assert [np.asarray(picture(entry["b64_json"]))[0, 0, 0] for entry in data] == [7, 8, 9]


async def test_without_a_seed_pictures_differ(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        seeds = {(await server.post(prompt="a cat")).json()["data"][0]["seed"] for _ in range(3)}

    assert len(seeds) == 3


@pytest.mark.parametrize(("name", "kind"), [("jpeg", "JPEG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
async def test_formats(tmp_path: Path, name: str, kind: str) -> None:
    async with running(tmp_path) as server:
        answer = (await server.post(prompt="a cat", output_format=name, output_compression=50)).json()

    assert picture(answer["data"][0]["b64_json"]).format == kind


async def test_a_url_leads_to_the_picture_until_it_is_deleted(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        answer = (await server.post(prompt="a cat", n=2, seed=3, response_format="url")).json()
        contents = [(await server.http.get(entry["url"])).content for entry in answer["data"]]
        found = (await server.http.get(f"/v1/images/{answer['id']}")).json()
        deleted = (await server.http.delete(f"/v1/images/{answer['id']}")).json()
        gone = await server.http.get(answer["data"][0]["url"])

    assert [np.asarray(Image.open(BytesIO(content)))[0, 0, 0] for content in contents] == [3, 4]
    assert found["data"] == answer["data"]
    assert deleted == {"id": answer["id"], "object": "image.deleted", "deleted": True}
    assert gone.status_code == 404
    assert error_of(gone)["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "64"}, "size"),
        ({"size": "5000x5000"}, "size"),
        ({"size": "64x64", "width": 32}, "size"),
        ({"n": 11}, "n"),
        ({"n": 0}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 5000}, "n"),
        ({"num_outputs": 5000}, "num_outputs"),
        ({"num_outputs": 0}, "num_outputs"),
        ({"num_outputs_per_prompt": 11}, "num_outputs_per_prompt"),
        ({"size": "0x64"}, "size"),
        ({"width": 0}, "width"),
        ({"width": 9000, "height": 9000}, "width"),
        ({"partial_images": 9, "stream": True}, "partial_images"),
        ({"num_inference_steps": 201}, "num_inference_steps"),
        ({"diffusers_kwargs": {"sigmas": [0.5] * 201}}, "diffusers_kwargs"),
        ({"prompt": "x" * 32_001}, "prompt"),
        ({"seed": [1, 3], "n": 2}, "seed"),
        ({"output_format": "gif"}, "output_format"),
        ({"background": "transparent"}, "background"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"guidance_scale": 1e300}, "guidance_scale"),
        ({"stepps": 3}, "stepps"),
        ({"enable_frame_interpolation": True}, "enable_frame_interpolation"),
        ({"upscaling_scale": 9}, "upscaling_scale"),
        ({"enable_upscaling": True, "upscaling_scale": 8, "size": "1024x1024"}, "size"),
        ({"enable_upscaling": True, "upscaling_model_path": "https://a.example/x.pth"}, "upscaling_model_path"),
        ({"enable_upscaling": True, "upscaling_model_path": "somebody/weights"}, "upscaling_model_path"),
        ({"enable_upscaling": True, "upscaling_model_path": "/etc/passwd"}, "upscaling_model_path"),
        ({"cache": {"method": "taylor", "order": 9}}, "cache.order"),
        ({"cache": "taylor"}, "cache"),
    ],
)
async def test_what_can_not_be_done_is_said(tmp_path: Path, fields: dict[str, Any], param: str) -> None:
    async with running(tmp_path) as server:
        answer = await server.post(**{"prompt": "a cat"} | fields)

    assert answer.status_code == 400
    assert error_of(answer)["param"] == param
    assert error_of(answer)["type"] == "invalid_request_error"
    assert "num_outputs_per_prompt" not in error_of(answer)["message"] or param == "num_outputs_per_prompt"
    assert server.engine.params == []


async def test_a_slip_is_answered_with_the_name_that_was_meant(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        answer = await server.post(prompt="a cat", num_inference_step=3)

    assert error_of(answer)["message"].endswith("did you mean num_inference_steps?")


@pytest.mark.parametrize(
    ("prompt", "status", "code", "should_retry"),
    [
        ("refuse invalid_request", 400, "invalid_value", None),
        ("refuse queue_full", 429, "queue_full", None),
        ("refuse model_error", 503, "model_error", "false"),
        ("fail invalid_request", 400, "invalid_value", "false"),
        ("fail out_of_memory", 500, "out_of_memory", "false"),
        ("nothing", 500, "pipeline_failed", "false"),
        ("break", 500, "internal_error", "false"),
    ],
)
async def test_failures_have_their_status(
    tmp_path: Path, prompt: str, status: int, code: str, should_retry: str | None
) -> None:
    async with running(tmp_path) as server:
        answer = await server.post(prompt=prompt)

    assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    assert answer.headers.get("x-should-retry") == should_retry
    assert ("retry-after" in answer.headers) == (status == 429)


async def test_layers_are_several_pictures(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        answer = (await server.post(prompt="layers 3")).json()

    assert len(answer["data"]) == 3


async def test_sglangs_fields_reach_the_engine(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as server:
        answer = await server.post(
            prompt="a cat",
            width=32,
            height=48,
            num_outputs_per_prompt=2,
            seed=[5, 6],
            negative_prompt="dogs",
            enable_teacache=False,
            flow_shift=3,
            user="me",
            extra_body={"num_inference_steps": 3, "diffusers_kwargs": {"eta": 0.5}},
        )

    assert answer.status_code == 200
    (params,) = engine.params
    assert (params.width, params.height, params.num_outputs_per_prompt, params.seed) == (32, 48, 2, 5)
    assert params.flow_shift == 3
    assert (params.negative_prompt, params.num_inference_steps, params.diffusers_kwargs) == ("dogs", 3, {"eta": 0.5})


async def test_nothing_blocks_the_event_loop(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        with blockbuster_ctx():
            answer = (await server.post(prompt="a cat", size="512x512", output_format="webp")).json()
            stream = await server.post(prompt="a cat", stream=True, partial_images=1)
            content = await server.http.get(f"/v1/images/{answer['id']}/content")
            found = await server.http.get(f"/v1/images/{answer['id']}")
            gone = await server.http.delete(f"/v1/images/{answer['id']}")

    assert [stream.status_code, content.status_code, found.status_code, gone.status_code] == [200] * 4


async def test_a_picture_that_is_being_made_is_cancelled_by_its_deletion(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as server, anyio.create_task_group() as tasks:
        answers: list[Any] = []

        async def ask() -> None:
            answers.append(await server.post(prompt="hang"))

        tasks.start_soon(ask)
        await engine.hanging.wait()
        (live,) = server.services.requests.all(ANYBODY)
        await server.http.delete(f"/v1/images/{live.id}")

    assert (answers[0].status_code, error_of(answers[0])["code"]) == (409, "cancelled")
    assert answers[0].headers["x-should-retry"] == "false"


async def test_a_picture_has_a_row_before_it_has_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, rows = LocalStorage.put, list[list[tuple[str, str]]]()

    async with running(tmp_path) as server:

        async def seen(storage: LocalStorage, *args: Any) -> None:
            rows.append([(job.id, job.status) for job in await server.services.jobs.latest(9)])
            await put(storage, *args)

        monkeypatch.setattr(LocalStorage, "put", seen)
        made = (await server.post(prompt="a cat")).json()
        rows.append([(job.id, job.status) for job in await server.services.jobs.latest(9)])
    assert rows == [[(made["id"], "failed")], [(made["id"], "completed")]]
