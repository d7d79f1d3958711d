from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import TEN, build

from sgld.worker.axes import Batched
from sgld.worker.probe import probed_axes
from worker.requests import Doublings, Sum, request


@pytest.mark.parametrize("name", [*TEN, "cogvideox_image_to_video", "modular_qwen_image"])
def test_axes_of_the_denoiser_are_learned(name: str) -> None:
    pipeline, kwargs = build(name)
    axes = probed_axes(pipeline, request(name, 0, kwargs))
    denoiser = "unet" if name == "sdxl" else "transformer"
    found = [call for key, call in axes.items() if key[:2] == (denoiser, "forward")]
    assert found
    assert all(call.arguments and call.results for call in found)


def batched(name: str, component: str) -> dict[Any, Batched]:
    pipeline, kwargs = build(name)
    axes = probed_axes(pipeline, request(name, 0, kwargs))
    (found,) = {tuple(call.arguments.items()) for key, call in axes.items() if key[0] == component}
    return {path[-1]: batched for path, batched in found}


def test_ids_of_flux_are_shared_and_its_embeddings_are_batched() -> None:
    found = batched("flux", "transformer")
    assert {"img_ids", "txt_ids"}.isdisjoint(found)
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"):
        assert found[name] == Batched(0, 1)


def test_guidance_that_doubles_the_rows_is_seen() -> None:
    found = batched("sdxl", "unet")
    assert found["text_embeds"] == Batched(0, 2)
    assert found["encoder_hidden_states"] == Batched(0, 2)


def test_lists_of_rows_are_seen() -> None:
    assert {value.axis for value in batched("z_image", "transformer").values()} >= {None}


@pytest.mark.parametrize("name", ["flux", "modular_flux"])
def test_probe_leaves_nothing_behind(name: str) -> None:
    pipeline, kwargs = build(name)
    call = request(name, 0, kwargs)
    generator, rng = call["generator"].get_state(), torch.get_rng_state()
    scheduler = repr(vars(pipeline.scheduler))
    probed_axes(pipeline, call)
    assert torch.equal(call["generator"].get_state(), generator)
    assert torch.equal(torch.get_rng_state(), rng)
    assert repr(vars(pipeline.scheduler)) == scheduler
    assert set(call) == set(request(name, 0, kwargs))


def test_probe_asks_no_gpu_of_other_ranks_for_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_rng_state", asked.append)
    pipeline, kwargs = build("flux")
    assert probed_axes(pipeline, request("flux", 0, kwargs))
    assert asked == []


@pytest.mark.parametrize("name", ["wan", "modular_wan"])
def test_probe_decodes_nothing(name: str) -> None:
    pipeline, kwargs = build(name)

    def decode(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("decoded")

    pipeline.vae.decode = decode
    assert any(key[0] == "transformer" for key in probed_axes(pipeline, request(name, 0, kwargs)))


def test_callbacks_of_a_request_are_not_called_by_a_probe() -> None:
    pipeline, kwargs = build("flux")
    called: list[int] = []

    def callback(_pipeline: Any, step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        called.append(step)
        return tensors

    assert probed_axes(pipeline, request("flux", 0, kwargs, callback_on_step_end=callback))
    assert called == []


def test_images_per_prompt_are_tried_where_two_prompts_are_refused() -> None:
    pipeline, kwargs = build("flux")
    call = request("flux", 0, kwargs)
    del call["prompt"]
    embeds = {"prompt_embeds": torch.ones(1, 16, 32), "pooled_prompt_embeds": torch.ones(1, 32)}
    axes = probed_axes(pipeline, call | embeds)
    assert [key[:2] for key in axes] == [("transformer", "forward")]


def test_pipeline_that_can_not_be_doubled_teaches_nothing() -> None:
    assert probed_axes(Doublings(torch.nn.Identity()), {"x": torch.ones(1, 2)}) == {}


class Refusing(DiffusionPipeline):  # type: ignore[misc]
    """Takes one prompt at a time."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)

    @torch.no_grad()
    def __call__(self, prompt: str | list[str], num_inference_steps: int = 3, output_type: str = "pt") -> Sum:
        if isinstance(prompt, list):
            raise ValueError("one prompt at a time")
        return Sum(images=self.transformer(torch.ones(1, 2)))


def test_pipeline_that_refuses_a_probe_teaches_nothing() -> None:
    pipeline = Refusing(torch.nn.Identity())
    assert probed_axes(pipeline, {"prompt": "a cat"}) == {}
