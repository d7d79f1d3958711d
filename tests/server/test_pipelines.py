"""Requests over HTTP up to a real pipeline with tiny random weights."""

from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
import pytest
from engine.streams import plain
from PIL import Image
from pipelines import build

from sgld.engine.engine import Engine
from sgld.sampling_params import SamplingParams
from sgld.server.serve import EngineFactory
from sgld.testing import InlineReplica

from .fakes import running
from .test_edits import png, upload
from .test_images import error_of

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


def serving(pipeline: Any) -> EngineFactory:
    return lambda config: Engine(config, rank_factory=InlineReplica(pipeline))


def pixels(answer: dict[str, Any]) -> Any:
    return np.asarray(Image.open(BytesIO(b64decode(answer["data"][0]["b64_json"]))))


async def test_the_picture_is_that_of_the_pipeline_itself(tmp_path: Path) -> None:
    pipeline, _ = build("sdxl")
    expected = plain(pipeline, SamplingParams(prompt="a cat", width=32, height=32, num_inference_steps=3, seed=5))

    async with running(tmp_path, factory=serving(pipeline)) as server:
        answer = await server.post(prompt="a cat", size="32x32", num_inference_steps=3, seed=5)

    assert answer.status_code == 200, answer.text
    assert np.abs(pixels(answer.json()).astype(int) - expected[0].astype(int)).max() <= 1


async def test_a_mask_is_really_used(tmp_path: Path) -> None:
    pipeline, _ = build("sdxl")
    fields = {"prompt": "a cat", "size": "32x32", "num_inference_steps": "3", "seed": "5"}
    masks = [png((32, 32), mode="L", color=value) for value in (0, 255)]

    async with running(tmp_path, factory=serving(pipeline)) as server:
        answers = [
            await server.http.post(
                "/v1/images/edits", data=fields, files=[upload("image", png((32, 32))), upload("mask", mask)]
            )
            for mask in masks
        ]

    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    kept, painted = (pixels(answer.json()) for answer in answers)
    assert not np.array_equal(kept, painted)


async def test_a_mask_that_no_pipeline_takes_is_refused(tmp_path: Path) -> None:
    pipeline, _ = build("pixart")

    async with running(tmp_path, factory=serving(pipeline)) as server:
        files = [upload("image", png((32, 32))), upload("mask", png((32, 32)))]
        answer = await server.http.post("/v1/images/edits", data={"prompt": "a cat"}, files=files)

    assert answer.status_code == 400
    assert "inpainting" in error_of(answer)["message"]


async def test_a_shift_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    pipeline, _ = build("sdxl")

    async with running(tmp_path, factory=serving(pipeline)) as server:
        answer = await server.post(prompt="a cat", size="32x32", num_inference_steps=1, flow_shift=3)

    assert answer.status_code == 400
    assert "flow_shift can't be 3.0: EulerDiscreteScheduler has no shift here" in error_of(answer)["message"]


async def test_previews_come_before_the_picture(tmp_path: Path) -> None:
    pipeline, _ = build("sdxl")

    async with running(tmp_path, factory=serving(pipeline)) as server:
        body = {"prompt": "a cat", "size": "32x32", "num_inference_steps": 4, "stream": True, "partial_images": 2}
        text = (await server.http.post("/v1/images/generations", json=body)).text

    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event")]
    assert names == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    datas = [msgspec.json.decode(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert [data.get("partial_image_index") for data in datas] == [0, 1, None]


async def test_metadata_repeats_the_picture_without_its_inputs(tmp_path: Path) -> None:
    pipeline, _ = build("sdxl")

    async with running(tmp_path, factory=serving(pipeline)) as server:
        answer = await server.post(
            prompt="a cat", size="32x32", num_inference_steps=3, seed=5, priority=3, deadline_s=1000, guidance_scale=2
        )

    content = b64decode(answer.json()["data"][0]["b64_json"])
    metadata = msgspec.json.decode(str(Image.open(BytesIO(content)).info["sgld"]))
    assert metadata["params"].keys() >= {"prompt", "seed", "width", "height", "guidance_scale"}
    assert not metadata["params"].keys() & {"priority", "deadline_s", "num_previews", "image_path"}


async def test_a_png_has_16_bits_where_they_are_asked_for(tmp_path: Path) -> None:
    pipeline, _ = build("sdxl")
    fields = {"prompt": "a cat", "size": "32x32", "num_inference_steps": 3, "bit_depth": 16}
    async with running(tmp_path, factory=serving(pipeline)) as server:
        answer = await server.post(**fields)
        refused = await server.post(**fields, output_format="webp")
        video = await server.http.post("/v1/videos", json=fields)

    with av.open(BytesIO(b64decode(answer.json()["data"][0]["b64_json"]))) as container:
        (picture,) = container.decode(video=0)
    assert picture.format.name == "rgb48be"
    assert len(np.unique(picture.to_ndarray())) > 256
    assert (refused.status_code, error_of(refused)["param"]) == (400, "bit_depth")
    assert (video.status_code, error_of(video)["param"]) == (400, "bit_depth")
