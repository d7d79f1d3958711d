from pathlib import Path
from typing import Any

import pytest

from sgld.config import EngineConfig, MemoryConfig
from sgld.errors import ModelError
from sgld.fields import FieldError
from sgld.models.plan import plan
from sgld.models.roles import Role, places, precisions, role

ROLES: dict[str, Role] = {
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder",
    "image_encoder": "image_encoder",
    "transformer": "dit",
    "vae": "vae",
    "scheduler": "none",
}


def config_of(**options: Any) -> EngineConfig:
    memory = {name: options.pop(name) for name in list(options) if name in MemoryConfig.__struct_fields__}
    return EngineConfig(model_path="m", memory=MemoryConfig(**memory), **options)


@pytest.mark.parametrize(
    ("name", "library", "class_name", "expected"),
    [
        ("transformer_2", "diffusers", "WanTransformer3DModel", "dit"),
        ("unet", "diffusers", "UNet2DConditionModel", "dit"),
        ("controlnet", "diffusers", "ControlNetModel", "dit"),
        ("prior_prior", "diffusers", "StableCascadeUNet", "dit"),
        ("vae", "fal", "Flux2TinyAutoEncoder", "vae"),
        ("audio_vae", "diffusers", "AutoencoderOobleck", "vae"),
        ("vocoder", "transformers", "SpeechT5HifiGan", "vae"),
        ("vqgan", "wuerstchen", "PaellaVQModel", "vae"),
        ("first_stage", "diffusers", "AutoencoderKL", "vae"),
        ("text_encoder_3", "transformers", "T5EncoderModel", "text_encoder"),
        ("prior_text_encoder", "transformers", "CLIPTextModel", "text_encoder"),
        ("vision_language_encoder", "transformers", "Qwen2_5_VLForConditionalGeneration", "text_encoder"),
        ("image_encoder", "transformers", "CLIPVisionModel", "image_encoder"),
        ("siglip", "transformers", "SiglipVisionModel", "image_encoder"),
        ("safety_checker", "stable_diffusion", "StableDiffusionSafetyChecker", "image_encoder"),
        ("tokenizer", "transformers", "T5TokenizerFast", "none"),
        ("image_processor", "transformers", "CLIPImageProcessor", "none"),
        ("image_noising_scheduler", "diffusers", "DDPMScheduler", "none"),
    ],
)
def test_role_of_a_component(name: str, library: str, class_name: str, expected: Role) -> None:
    assert role(name, library, class_name) == expected


def test_all_components_have_the_precision_of_the_denoiser_unless_told_otherwise() -> None:
    assert precisions(ROLES, config_of(), "bf16") == dict.fromkeys([n for n in ROLES if n != "scheduler"], "bf16")


def test_text_encoders_have_precisions_of_their_own_and_image_encoders_the_first() -> None:
    given = precisions(ROLES, config_of(text_encoder_precision=("fp32",), vae_precision="fp16"), "bf16")
    assert given == {
        "text_encoder": "fp32",
        "text_encoder_2": "fp32",
        "image_encoder": "fp32",
        "transformer": "bf16",
        "vae": "fp16",
    }
    given = precisions(ROLES, config_of(text_encoder_precision=("fp32", "fp16")), "bf16")
    assert (given["text_encoder"], given["text_encoder_2"], given["image_encoder"]) == ("fp32", "fp16", "fp32")


def test_as_many_precisions_as_text_encoders() -> None:
    with pytest.raises(ModelError, match=r"has 3 values, but m has 2 text encoders \(text_encoder, text_encoder_2\)"):
        precisions(ROLES, config_of(text_encoder_precision=("fp32", "fp16", "bf16")), "bf16")


def test_offloaded_components_wait_on_the_cpu_of_a_machine_with_a_gpu() -> None:
    config = config_of(text_encoder_cpu_offload=True, dit_layerwise_offload=True)
    chosen, notes, _ = places(ROLES, config, "cuda")
    assert chosen == {"text_encoder": "offload", "text_encoder_2": "offload", "transformer": "layerwise"}
    assert notes["text_encoder"] == "on the CPU between its calls"
    assert "layers come to the GPU" in notes["transformer"]


def test_without_a_gpu_there_is_nothing_to_offload() -> None:
    chosen, notes, _ = places(ROLES, config_of(dit_cpu_offload=True, vae_cpu_offload=True), "cpu")
    assert chosen == {}
    assert notes == dict.fromkeys(
        ["transformer", "vae"], "already on the CPU, where it computes: there is nothing to offload"
    )


def test_offload_of_what_a_model_does_not_have_is_said_to_do_nothing() -> None:
    _, _, of_model = places({"vae": "vae"}, config_of(image_encoder_cpu_offload=True), "cuda")
    assert of_model == ("image_encoder_cpu_offload does nothing: the model has no image encoder",)


def test_a_denoiser_is_offloaded_in_one_way() -> None:
    with pytest.raises(FieldError, match="dit_cpu_offload is set, too"):
        MemoryConfig(dit_cpu_offload=True, dit_layerwise_offload=True)


def test_decisions_show_precision_and_place(sdxl_folder: Path) -> None:
    memory = MemoryConfig(text_encoder_precision=("fp32", "bf16"), text_encoder_cpu_offload=True)
    config = EngineConfig(model_path=str(sdxl_folder), device="cpu", dit_precision="bf16", memory=memory)
    decisions = plan(config).decisions()
    assert decisions["text_encoder"].startswith("fp32; already on the CPU")
    assert decisions["text_encoder_2"].startswith("bf16; already on the CPU")
    assert decisions["unet"] == "bf16"
    assert decisions["vae"] == "bf16"
