"""Models made of their configuration alone."""

from pathlib import Path

import diffusers
import transformers
from pipelines.parts import clip, vae

from sgld.models.blueprints import model_class, without_weights
from sgld.models.sources import ComponentSource


def test_models_of_both_libraries_are_made_without_weights(tmp_path: Path) -> None:
    clip().config.save_pretrained(tmp_path / "clip")
    vae().save_config(tmp_path / "vae")
    for cls, name in ((transformers.CLIPTextModel, "clip"), (diffusers.AutoencoderKL, "vae")):
        model = without_weights(cls, ComponentSource(str(tmp_path), name))
        assert type(model) is cls
        assert {weight.device.type for weight in model.parameters()} == {"meta"}
        assert {buffer.device.type for buffer in model.buffers()} <= {"cpu"}


def test_classes_of_models_are_known_by_library_and_name() -> None:
    assert model_class("diffusers", "AutoencoderKL") is diffusers.AutoencoderKL
    assert model_class("transformers", "T5EncoderModel") is transformers.T5EncoderModel
    assert model_class("diffusers", "DDIMScheduler") is None
    assert model_class("transformers", "AutoencoderKL") is None
    assert model_class("elsewhere", "T5EncoderModel") is None
