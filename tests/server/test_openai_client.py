"""OpenAI's own Python client, unchanged, against a real server."""

from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI

from .fakes import FakeEngine, Running, running
from .test_edits import png
from .test_images import picture


def client_of(server: Running, *, api_key: str = "none", max_retries: int = 2) -> AsyncOpenAI:
    return AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key=api_key, max_retries=max_retries, _strict_response_validation=True
    )


async def test_generate(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client_of(server) as client:
        result = await client.images.generate(
            model="gpt-image-1",
            prompt="a cat",
            n=2,
            size="1024x1024",
            quality="high",
            moderation="low",
            extra_body={"num_inference_steps": 3, "seed": 7},
        )

    assert result.data is not None
    assert [picture(image.b64_json or "").size for image in result.data] == [(1024, 1024)] * 2
    assert result.size == "1024x1024"
    assert server.engine.params[0].num_inference_steps == 3


async def test_edit_with_mask(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client_of(server) as client:
        image, mask = ("a.png", png()), ("m.png", png(mode="RGBA", color=(0, 0, 0, 0)))
        result = await client.images.edit(model="x", image=[image], mask=mask, prompt="a cat", n=1)

    assert result.data is not None
    assert len(server.engine.params[0].image_path) == 1
    assert "mask_image" in server.engine.params[0].diffusers_kwargs


async def test_a_stream_has_partial_images_and_then_the_picture(tmp_path: Path) -> None:
    async with running(tmp_path, heartbeat_s=0.01) as server, client_of(server) as client:
        stream = await client.images.generate(
            model="x", prompt="a cat", stream=True, partial_images=2, output_format="webp", size="32x16"
        )
        events = [event async for event in stream]

    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events if hasattr(event, "partial_image_index")] == [0, 1]
    assert [picture(event.b64_json).size for event in events] == [(6, 4), (6, 4), (32, 16)]
    assert events[-1].size == "32x16"


async def test_a_streamed_edit(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client_of(server) as client:
        stream = await client.images.edit(
            model="x", image=("a.png", png()), prompt="a cat", stream=True, partial_images=1
        )
        events = [event async for event in stream]

    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


async def test_a_failure_in_a_stream_is_an_error(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client_of(server) as client:
        stream = await client.images.generate(model="x", prompt="fail out_of_memory", stream=True)
        with pytest.raises(openai.APIError, match="it broke") as caught:
            _ = [event async for event in stream]

    assert caught.value.code == "out_of_memory"


async def test_a_stream_that_is_refused_has_a_status(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client_of(server, max_retries=0) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            await client.images.generate(model="x", prompt="refuse queue_full", stream=True)

    assert caught.value.code == "queue_full"
    assert caught.value.request_id


@pytest.mark.parametrize(
    ("prompt", "error", "num_tries"),
    [
        ("fail out_of_memory", openai.InternalServerError, 1),
        ("refuse model_error", openai.InternalServerError, 1),
        ("refuse invalid_request", openai.BadRequestError, 1),
        ("refuse engine_closed", openai.InternalServerError, 2),
    ],
)
async def test_only_what_may_go_better_is_tried_again(
    tmp_path: Path, prompt: str, error: type[openai.APIStatusError], num_tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client would wait as long as the server says.
    monkeypatch.setattr("sgld.server.errors._RETRY_AFTER_S", 0.0)
    async with running(tmp_path) as server, client_of(server, max_retries=1) as client:
        with pytest.raises(error):
            await client.images.generate(model="x", prompt=prompt)

    assert len(server.engine.params) == num_tries


async def test_models(tmp_path: Path) -> None:
    async with running(tmp_path, served_model_name="org/name") as server, client_of(server) as client:
        listed = [model.id async for model in client.models.list()]
        model = await client.models.retrieve("org/name")
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("org/other")

    assert (listed, model.id) == (["org/name"], "org/name")
    assert caught.value.code == "model_not_found"


async def test_a_wrong_key_is_an_authentication_error(tmp_path: Path) -> None:
    async with running(tmp_path, api_key=("right",)) as server:
        async with client_of(server, api_key="right") as client:
            await client.images.generate(model="x", prompt="a cat")
        async with client_of(server, api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.images.generate(model="x", prompt="a cat")


async def test_the_client_can_be_closed_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as server, client_of(server) as client:
        stream = await client.images.generate(model="x", prompt="hang", stream=True)
        await engine.hanging.wait()
        await stream.close()
        await engine.has_ended.wait()
