"""What SGLang Diffusion's documentation shows clients to do, with the fields and headers that it has there.

Source: sgl-project/sglang, docs/diffusion/api/openai_api.md; what it shows of adapters is in test_loras.py.
"""

import re
import shlex
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from sgld.events import AnyEvent
from sgld.media.inputs import InputPolicy
from sgld.request import NO_LIMITS, Limits
from sgld.sampling_params import SamplingParams

from .fakes import FakeEngine, running
from .test_edits import png
from .test_images import picture

BASE = "http://localhost:30010"
KEY = "sk-proj-1234567890"
PROMPT = "A cat plays the piano"
PICTURE = {"prompt": PROMPT, "size": "1024x1024", "n": 1, "response_format": "b64_json"}


def curl(path: str, *flags: str, method: str = "POST") -> str:
    return shlex.join(["curl", "-sS", "-X", method, BASE + path, "-H", f"Authorization: Bearer {KEY}", *flags])


def as_json(body: dict[str, Any]) -> list[str]:
    return ["-H", "Content-Type: application/json", "-d", msgspec.json.encode(body).decode()]


def edit(response_format: str) -> str:
    """A picture and the place of another one; `url` may name a file that the operator allows."""
    fields = ["image=@local_input_image.png", "url=image_url.jpg", f"prompt={PROMPT}", "size=1024x1024"]
    flags = [word for field in (*fields, f"response_format={response_format}") for word in ("-F", field)]
    return curl("/v1/images/edits", *flags)


class VideoEngine(FakeEngine):
    """Its model makes videos, as long as it likes where nothing is said."""

    async def generate(
        self, params: SamplingParams, *, inputs: InputPolicy, waited_s: float = 0.0, limits: Limits = NO_LIMITS
    ) -> AsyncGenerator[AnyEvent, None]:
        """The events of a request."""
        params = msgspec.structs.replace(params, num_frames=params.num_frames or 5)
        async for event in super().generate(params, inputs=inputs):
            yield event


async def run(url: str, folder: Path, command: str) -> bytes:
    words = [word.replace(BASE, url) for word in shlex.split(command)]
    return (await anyio.run_process([*words, "--fail"], cwd=folder)).stdout


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where client and server run."""
    monkeypatch.chdir(tmp_path)
    for name in ("local_input_image.png", "image_url.jpg"):
        (tmp_path / name).write_bytes(png())
    return tmp_path


async def test_a_picture(folder: Path) -> None:
    async with running(folder) as server:
        answer = msgspec.json.decode(await run(server.url, folder, curl("/v1/images/generations", *as_json(PICTURE))))

    assert picture(answer["data"][0]["b64_json"]).size == (1024, 1024)


async def test_the_edit_of_a_picture(folder: Path) -> None:
    async with running(folder, allow_path=(str(folder),)) as server:
        answer = msgspec.json.decode(await run(server.url, folder, edit("b64_json")))

    assert picture(answer["data"][0]["b64_json"]).size == (1024, 1024)
    assert len(server.engine.params[0].image_path) == 2


async def test_an_edit_is_downloaded(folder: Path) -> None:
    async with running(folder, allow_path=(str(folder),)) as server:
        answer = msgspec.json.decode(await run(server.url, folder, edit("url")))
        found = re.search(r"/v1/images/([^/]+)/content", answer["data"][0]["url"])
        assert found
        await run(server.url, folder, curl(f"/v1/images/{found[1]}/content", "-L", "-o", "output.png", method="GET"))

    assert (folder / "output.png").read_bytes().startswith(b"\x89PNG")


async def test_videos(folder: Path) -> None:
    body = {"prompt": PROMPT, "size": "1280x720"}
    async with running(folder, VideoEngine()) as server:
        made = msgspec.json.decode(await run(server.url, folder, curl("/v1/videos", *as_json(body))))
        # A stream of its events ends with it.
        await run(server.url, folder, curl(f"/v1/videos/{made['id']}/events", method="GET"))
        listed = msgspec.json.decode(await run(server.url, folder, curl("/v1/videos", method="GET")))
        download = curl(f"/v1/videos/{made['id']}/content", "-L", "-o", "output.mp4", method="GET")
        await run(server.url, folder, download)

    assert (made["object"], made["status"], made["size"]) == ("video", "queued", "1280x720")
    assert [(video["id"], video["status"]) for video in listed["data"]] == [(made["id"], "completed")]
    assert (folder / "output.mp4").read_bytes()[4:8] == b"ftyp"


async def test_what_it_serves(folder: Path) -> None:
    async with running(folder) as server:
        answer = msgspec.json.decode(await run(server.url, folder, curl("/models", method="GET")))

    assert (answer["model_path"], answer["pipeline_class"]) == ("sgld/tiny-image", "FakePipeline")
    assert answer["num_gpus"] == 1


PICTURE_PROGRAM = f"""
import base64
from openai import OpenAI

client = OpenAI(api_key="{KEY}", base_url="{BASE}/v1")
made = client.images.generate(prompt="{PROMPT}", size="1024x1024", n=1, response_format="b64_json")
print(base64.b64decode(made.data[0].b64_json)[1:4].decode())
"""
VIDEO_PROGRAM = f"""
import time
from openai import OpenAI

client = OpenAI(api_key="{KEY}", base_url="{BASE}/v1")
video = client.videos.create(prompt="{PROMPT}", size="1280x720")
while True:
    page = client.videos.list()
    item = next((v for v in page.data if v.id == video.id), None)
    if item and item.status in ("completed", "failed"):
        break
    time.sleep(0.1)
print(client.videos.download_content(video_id=video.id).read()[4:8].decode())
"""


@pytest.mark.parametrize(
    ("program", "engine_class", "printed"), [(PICTURE_PROGRAM, FakeEngine, "PNG"), (VIDEO_PROGRAM, VideoEngine, "ftyp")]
)
async def test_programs_with_openai_s_client(
    folder: Path, program: str, engine_class: type[FakeEngine], printed: str
) -> None:
    async with running(folder, engine_class()) as server:
        source = program.replace(BASE, server.url)
        done = await anyio.run_process([sys.executable, "-W", "ignore", "-c", source], cwd=folder)

    assert done.stdout.decode().strip() == printed
