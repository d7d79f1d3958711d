"""/v1/images/edits and variations: uploads, URLs and masks on their way to the engine."""

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from .fakes import FakeEngine, running
from .test_images import error_of

Files = list[tuple[str, tuple[str, bytes, str]]]


def png(size: tuple[int, int] = (8, 6), color: Any = "red", mode: str = "RGB") -> bytes:
    buffer = BytesIO()
    Image.new(mode, size, color).save(buffer, "PNG")
    return buffer.getvalue()


def upload(name: str, content: bytes) -> tuple[str, tuple[str, bytes, str]]:
    return (name, ("a.png", content, "image/png"))


def opened(source: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(source.partition(",")[2])))


async def test_pictures_reach_the_engine_in_their_order(tmp_path: Path) -> None:
    engine = FakeEngine()
    files = [upload("image[]", png(color="red")), upload("image[]", png(color="blue"))]
    async with running(tmp_path, engine) as server:
        answer = await server.http.post("/v1/images/edits", data={"prompt": "a cat", "n": "2"}, files=files)

    assert answer.status_code == 200
    (params,) = engine.params
    colors = [opened(source).getpixel((0, 0)) for source in params.image_path]
    assert colors == [(255, 0, 0), (0, 0, 255)]
    assert params.num_outputs_per_prompt == 2


async def test_fields_of_a_form_have_their_types(tmp_path: Path) -> None:
    engine = FakeEngine()
    fields = {
        "prompt": "123",
        "num_inference_steps": "3",
        "guidance_scale": "2.5",
        "stream": "false",
        "diffusers_kwargs[strength]": "0.5",
        "diffusers_kwargs[sigmas][]": ["1", "0.5"],
        "extra_body": '{"seed": 9}',
        "size": "32x16",
        "user": "",
    }
    async with running(tmp_path, engine) as server:
        answer = await server.http.post("/v1/images/edits", data=fields, files=[upload("image", png())])

    assert answer.status_code == 200
    (params,) = engine.params
    assert (params.prompt, params.num_inference_steps, params.guidance_scale, params.seed) == ("123", 3, 2.5, 9)
    assert params.diffusers_kwargs == {"strength": 0.5, "sigmas": [1, 0.5]}
    assert (params.width, params.height) == (32, 16)


@pytest.mark.parametrize(
    ("mask", "painted"),
    [
        (png(mode="RGBA", color=(9, 9, 9, 0)), 255),
        (png(mode="RGBA", color=(9, 9, 9, 255)), 0),
        (png(mode="L", color=255), 255),
        (png(mode="L", color=0), 0),
    ],
    ids=["transparent", "opaque", "white", "black"],
)
async def test_masks_are_white_where_the_picture_changes(tmp_path: Path, mask: bytes, painted: int) -> None:
    engine = FakeEngine()
    files = [upload("image", png()), upload("mask", mask)]
    async with running(tmp_path, engine) as server:
        answer = await server.http.post("/v1/images/edits", data={"prompt": "a cat"}, files=files)

    assert answer.status_code == 200
    reference = engine.params[0].diffusers_kwargs["mask_image"]
    assert reference["mode"] == "L"
    assert (np.asarray(opened(reference["$image"]).convert("L")) == painted).all()


@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ({"prompt": "a"}, [], "image"),
        ({"prompt": "a"}, [upload("image", b"no picture")], "image"),
        ({"prompt": "a"}, [upload("image", png((100, 100)))], "image"),
        ({"prompt": "a", "mask": "http://x"}, [upload("image", png())], "mask"),
        ({"prompt": "a"}, [upload("image", png()), upload("mask", png()), upload("mask", png())], "mask"),
        ({"prompt": "a"}, [upload("image", png()), upload("lora", png())], "lora"),
        ({"prompt": "a", "url": "/etc/passwd"}, [upload("model", png())], "model"),
        ({"prompt": "a", "n": "two"}, [upload("image", png())], "n"),
    ],
)
async def test_what_is_no_edit_is_said(tmp_path: Path, fields: dict[str, str], files: Files, param: str) -> None:
    async with running(tmp_path, max_pixels=5000) as server:
        # A form even where there are no files.
        files = files or [("", ("", b"", ""))]
        answer = await server.http.post("/v1/images/edits", data=fields, files=files)

    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param
    assert server.engine.params == []


async def test_files_of_a_form_are_pictures_where_objects_name_them(tmp_path: Path) -> None:
    engine = FakeEngine()
    images = [{"$image": "pose"}, {"$image": "depth", "mode": "L"}]
    fields = {"prompt": "a cat", "diffusers_kwargs": json.dumps({"control_image": images, "strength": 0.5})}
    files = [upload("pose", png(color="red")), upload("depth", png(color="blue"))]
    async with running(tmp_path, engine) as server:
        answer = await server.http.post("/v1/images/edits", data=fields, files=files)
        video = await server.http.post("/v1/videos", data=fields, files=files)
        twice = await server.http.post("/v1/images/edits", data=fields, files=[*files, upload("pose", png())])
        unused = await server.http.post("/v1/images/edits", data=fields, files=[*files, upload("edge", png())])

    assert (answer.status_code, video.status_code) == (200, 200), (answer.text, video.text)
    kwargs = engine.params[0].diffusers_kwargs
    pose, depth = kwargs["control_image"]
    assert [opened(picture["$image"]).getpixel((0, 0)) for picture in (pose, depth)] == [(255, 0, 0), (0, 0, 255)]
    assert (pose["mode"], depth["mode"], kwargs["strength"]) == ("RGB", "L", 0.5)
    assert [(refused.status_code, error_of(refused)["param"]) for refused in (twice, unused)] == [
        (400, "pose"),
        (400, "edge"),
    ]


@pytest.mark.parametrize("depth", [600, 5000])
async def test_what_is_nested_too_deeply_is_said(tmp_path: Path, depth: int) -> None:
    nested = '{"x": ' + "[" * depth + "]" * depth + "}"
    async with running(tmp_path) as server:
        body = f'{{"prompt": "a cat", "diffusers_kwargs": {nested}}}'
        headers = {"content-type": "application/json"}
        generation = await server.http.post("/v1/images/generations", content=body, headers=headers)
        data = {"prompt": "a cat", "diffusers_kwargs": nested}
        edit = await server.http.post("/v1/images/edits", data=data, files=[upload("pose", png())])

    for answer in (generation, edit):
        assert (answer.status_code, error_of(answer)["message"]) == (400, "the body is nested too deeply")


async def test_json_is_no_form(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        answer = await server.http.post("/v1/images/edits", json={"prompt": "a"})

    assert answer.status_code == 415
    assert error_of(answer)["code"] == "unsupported_media_type"


async def test_a_variation_needs_no_prompt(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        answer = await server.http.post("/v1/images/variations", files=[upload("image", png())])

    assert answer.status_code == 200


@pytest.mark.parametrize("source", ["/etc/passwd", "file:///etc/passwd", "outside.png"])
async def test_no_file_of_the_server_is_read(tmp_path: Path, source: str) -> None:
    async with running(tmp_path) as server:
        kwargs = {"mask_image": {"$image": source}}
        answer = await server.post(prompt="a cat", diffusers_kwargs=kwargs)

    assert answer.status_code == 400
    assert server.engine.params == []


async def test_files_below_named_folders_are_read_but_links_out_of_them_are_not(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (allowed / "in.png").write_bytes(png())
    (tmp_path / "out.png").write_bytes(png())
    (allowed / "link.png").symlink_to(tmp_path / "out.png")

    async with running(tmp_path, allow_path=(str(allowed),)) as server:
        statuses = [
            (await server.post(prompt="a cat", diffusers_kwargs={"x": {"$image": str(allowed / name)}})).status_code
            for name in ("in.png", "link.png", "../out.png")
        ]

    assert statuses == [200, 400, 400]


async def test_private_addresses_are_not_asked_unless_that_is_allowed(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        data = {"prompt": "a", "url": f"{server.url}/v1/models"}
        answer = await server.http.post("/v1/images/edits", data=data)
    async with running(tmp_path, allow_private_urls=True) as server:
        data = {"prompt": "a", "url": f"{server.url}/v1/models"}
        other = await server.http.post("/v1/images/edits", data=data)

    assert (answer.status_code, other.status_code) == (400, 400)
    assert "isn't a public address" in error_of(answer)["message"]
    assert "isn't an image" in error_of(other)["message"]
