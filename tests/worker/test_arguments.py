from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from PIL import Image
from pipelines import build

from sgld.errors import InvalidRequest
from sgld.sampling_params import SamplingParams
from sgld.worker.arguments import arguments, num_steps, parameters_of


def made(name: str, defaults: dict[str, Any] | None = None, images: Any = (), **params: Any) -> dict[str, Any]:
    pipeline, _ = build(name)
    return arguments(pipeline, SamplingParams(**params), defaults or {}, images)


def test_only_what_was_chosen_is_given() -> None:
    found = made("flux", prompt="a cat", seed=3)
    assert set(found) == {"prompt", "generator", "output_type"}
    assert (found["prompt"], found["output_type"]) == ("a cat", "pt")


def test_chosen_values_go_by_the_names_of_the_pipeline() -> None:
    chosen: dict[str, Any] = {
        "height": 64,
        "width": 32,
        "num_inference_steps": 7,
        "guidance_scale": 2.5,
        "max_sequence_length": 16,
    }
    found = made("flux", prompt="a cat", negative_prompt="a dog", true_cfg_scale=2.0, **chosen)
    assert found.items() >= (chosen | {"negative_prompt": "a dog", "true_cfg_scale": 2.0}).items()


def test_recommended_values_stand_where_nothing_was_chosen() -> None:
    defaults = {"height": 64, "width": 64, "num_inference_steps": 9, "fps": 8}
    found = made("flux", defaults, prompt="a cat", height=32)
    assert (found["height"], found["width"], found["num_inference_steps"]) == (32, 64, 9)
    assert "fps" not in found


def test_generator_has_the_seed() -> None:
    generator = made("flux", prompt="a cat", seed=5)["generator"]
    same = torch.Generator().manual_seed(5)
    assert torch.equal(torch.randn(3, generator=generator), torch.randn(3, generator=same))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_generator_on_a_missing_gpu_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no GPU") as caught:
        made("flux", prompt="a cat", generator_device="cuda")
    assert caught.value.param == "generator_device"


def test_what_the_pipeline_does_not_take_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="FluxPipeline takes no guidance_rescale; it takes prompt, ") as caught:
        made("flux", prompt="a cat", guidance_rescale=0.5)
    assert caught.value.param == "guidance_rescale"


def test_frames_of_a_picture_are_refused_but_one() -> None:
    assert "num_frames" not in made("flux", prompt="a cat", num_frames=1)
    with pytest.raises(InvalidRequest, match="takes no num_frames"):
        made("flux", prompt="a cat", num_frames=9)
    assert made("wan", prompt="a cat", num_frames=1)["num_frames"] == 1


def test_frame_rate_goes_only_to_pipelines_that_know_of_it() -> None:
    assert made("ltx", prompt="a cat", fps=24)["frame_rate"] == 24
    assert not {"fps", "frame_rate"} & set(made("wan", prompt="a cat", fps=24))


def test_images_go_to_pipelines_that_take_them() -> None:
    picture = Image.new("RGB", (8, 8))
    assert made("wan_i2v", prompt="a cat", images=[picture])["image"] is picture
    assert made("wan_i2v", prompt="a cat", images=[picture] * 2)["image"] == [picture] * 2
    with pytest.raises(InvalidRequest, match="takes no image"):
        made("flux", prompt="a cat", images=[picture])


def test_further_arguments_go_by_their_names() -> None:
    extra = {"guidance_scale_2": 1.0, "attention_kwargs": {"a": 1}}
    found = made("wan", prompt="a cat", diffusers_kwargs={"attention_kwargs": {"a": 1}}, guidance_scale_2=1.0)
    assert found.items() >= extra.items()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("generator", "is set by sgld itself"),
        ("output_type", "is set by sgld itself"),
        ("num_images_per_prompt", "is set by sgld itself"),
        ("height", "give height itself instead"),
        ("atention_kwargs", "did you mean attention_kwargs"),
        ("zzz", "the pipeline has no such parameter; it takes prompt"),
        ("self", "the pipeline has no such parameter"),
    ],
)
def test_further_arguments_that_can_not_be_given_are_refused(name: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        made("wan", prompt="a cat", diffusers_kwargs={name: 1})
    assert caught.value.param == "diffusers_kwargs"


@pytest.mark.parametrize("value", ["/etc/hostname", ["http://127.0.0.1/x.png"], [{"url": "x.png"}], "data:,x"])
def test_text_in_the_place_of_a_picture_is_refused_as_pipelines_may_read_it_as_a_file(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="last_image holds text; a picture is written as") as caught:
        made("wan_i2v", prompt="a cat", diffusers_kwargs={"last_image": value})
    assert caught.value.param == "diffusers_kwargs"


def test_references_to_pictures_may_be_anywhere() -> None:
    kwargs = {"last_image": [{"$image": "/somewhere.png", "mode": "L"}]}
    assert made("wan_i2v", prompt="a cat", diffusers_kwargs=kwargs).items() >= kwargs.items()


def test_lists_are_the_pairs_that_pipelines_declare() -> None:
    kwargs = {"original_size": [64, 32], "crops_coords_top_left": [8, 0], "sigmas": [1.0, 0.5]}
    found = made("sdxl", prompt="a cat", diffusers_kwargs=kwargs)
    assert found.items() >= {"original_size": (64, 32), "crops_coords_top_left": (8, 0), "sigmas": [1.0, 0.5]}.items()
    modular = made("modular_sdxl", prompt="a cat", diffusers_kwargs=kwargs)
    assert modular.items() >= {n: found[n] for n in kwargs}.items()


@pytest.mark.parametrize(("name", "argument"), [("sdxl", "latents"), ("z_image", "prompt_embeds"), ("flux", "latents")])
def test_tensors_are_refused_as_json_has_none(name: str, argument: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{argument} is a tensor for the pipeline, which can't be sent"):
        made(name, prompt="a cat", diffusers_kwargs={argument: [[1.0]]})


def test_only_what_is_surely_a_tensor_is_refused() -> None:
    class Own:
        def __call__(self, a: list[float | torch.Tensor], b: torch.Tensor, c: "list[torch.Tensor]", d: Any) -> None:
            pass

    kwargs = {"a": [1.0], "b": 44100, "c": [1.0], "d": [1.0]}
    found = arguments(Own(), SamplingParams(prompt="", diffusers_kwargs=kwargs), {}, [])
    assert found.items() >= kwargs.items()


def test_steps_come_from_the_arguments_or_the_signature() -> None:
    pipeline, _ = build("flux")
    assert num_steps(pipeline, {"num_inference_steps": 4}) == 4
    assert num_steps(pipeline, {}) == 28
    assert num_steps(pipeline, {"num_inference_steps": None}) == 0


def test_parameters_are_those_that_go_by_name() -> None:
    class Pipeline:
        def __call__(self, a: int, *args: int, b: int = 2, **kwargs: int) -> None: ...

    assert list(parameters_of(Pipeline())) == ["a", "b"]


def test_class_that_takes_any_keyword_takes_those_of_its_base() -> None:
    class Base:
        def __call__(self, prompt: str, height: int = 8, **kwargs: Any) -> None: ...

    class Own(Base):
        def __call__(self, *args: Any, scale: float = 1.0, **kwargs: Any) -> None: ...

    assert list(parameters_of(Own())) == ["prompt", "height", "scale"]


def test_modular_pipeline_takes_what_its_blocks_take() -> None:
    pipeline, _ = build("modular_flux")
    assert {"prompt", "generator", "output_type", "num_inference_steps"} <= parameters_of(pipeline).keys()
    assert set(made("modular_flux", prompt="a cat")) == {"prompt", "generator", "output_type"}
    assert num_steps(pipeline, {}) == 50
    with pytest.raises(InvalidRequest, match="FluxModularPipeline takes no num_frames"):
        made("modular_flux", prompt="a cat", num_frames=9)


def test_sibling_pipeline_takes_what_its_own_signature_has() -> None:
    pipeline, _ = build("sdxl")
    sibling = StableDiffusionXLImg2ImgPipeline(**pipeline.components)
    picture = Image.new("RGB", (8, 8))
    params = SamplingParams(prompt="a cat", diffusers_kwargs={"strength": 0.5})
    found = arguments(sibling, params, {"height": 64, "strength": 0.9}, [picture])
    assert (found["image"], found["strength"], "height" in found) == (picture, 0.5, False)
