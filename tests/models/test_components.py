import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import AutoModel, DiffusionPipeline
from pipelines import BUILDERS
from pipelines.parts import clip, vae

from sgld.config import EngineConfig, SourceConfig
from sgld.errors import ModelError
from sgld.models.describe import describe
from sgld.models.load import LoadedModel, load
from sgld.models.plan import plan
from sgld.models.resolve import INDEX_FILE
from sgld.models.verdicts import VerdictFile
from sgld.testing import run_together

pytestmark = pytest.mark.usefixtures("threads_as_before")


def configured(folder: Path, **config: Any) -> EngineConfig:
    return EngineConfig(model_path=str(folder), device="cpu", num_cpu_threads=1, **config)


def loaded(folder: Path, **paths: Path) -> LoadedModel:
    return load(configured(folder, component_paths={name: str(path) for name, path in paths.items()}))


def failure(folder: Path, **config: Any) -> str:
    """What is told of components that can't be had; always in one line."""
    with pytest.raises(ModelError) as caught:
        load(configured(folder, **config))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pictures(pipeline: Any, name: str, **kwargs: Any) -> torch.Tensor:
    made = pipeline(
        prompt="a red cat",
        num_inference_steps=4,
        output_type="pt",
        generator=torch.Generator().manual_seed(3),
        **BUILDERS[name].kwargs,
        **kwargs,
    )
    return torch.as_tensor(made.images)


def test_component_with_code_of_its_own_makes_the_picture_that_diffusers_makes(
    flux2_folder: Path, tiny_autoencoder: Path
) -> None:
    paths = {"vae": str(tiny_autoencoder)}
    model = load(configured(flux2_folder, component_paths=paths, trust_remote_code=True))
    own = AutoModel.from_pretrained(str(tiny_autoencoder), trust_remote_code=True)
    expected = pictures(DiffusionPipeline.from_pretrained(flux2_folder, vae=own), "flux2")
    torch.testing.assert_close(pictures(model.pipeline, "flux2"), expected, rtol=0, atol=0)
    assert model.decisions["vae"] == f"fp32; Flux2TinyAutoEncoder from {tiny_autoencoder}"
    calls = [
        {"prompt": prompt, "num_inference_steps": 4, "output_type": "pt", **BUILDERS["flux2"].kwargs}
        for prompt in ("a red cat", "a dog")
    ]
    report = run_together(model.pipeline, [c | {"generator": torch.Generator().manual_seed(3)} for c in calls])
    torch.testing.assert_close(report.outputs[0].images, expected, rtol=1e-4, atol=1e-5)
    assert report.merged_calls > 0


def test_code_of_a_component_does_not_run_untrusted(flux2_folder: Path, tiny_autoencoder: Path) -> None:
    message = failure(flux2_folder, component_paths={"vae": str(tiny_autoencoder)})
    assert message.endswith("is code of its own (Flux2TinyAutoEncoder); allow it with --trust-remote-code")


def test_model_whose_own_component_is_code(flux2_folder: Path, tiny_autoencoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(flux2_folder, folder, ignore=shutil.ignore_patterns("vae"))
    shutil.copytree(tiny_autoencoder, folder / "vae")
    index = json.loads((folder / INDEX_FILE).read_text())
    # As diffusers writes it.
    index["vae"] = ["diffusers_modules.local.flux2_tiny_autoencoder", "Flux2TinyAutoEncoder"]
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert "allow it with --trust-remote-code" in failure(folder)
    model = load(configured(folder, trust_remote_code=True))
    assert type(model.pipeline.vae).__name__ == "Flux2TinyAutoEncoder"
    (folder / "vae" / "flux2_tiny_autoencoder.py").unlink()
    message = failure(folder, trust_remote_code=True)
    assert message.endswith("has no flux2_tiny_autoencoder.py, where its class Flux2TinyAutoEncoder should be")


def test_components_of_all_kinds_come_from_other_places(sdxl_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    vae().save_pretrained(tmp_path / "vae")
    clip(has_projection=True).save_pretrained(tmp_path / "clip")
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "ddim")
    (tmp_path / "words").mkdir()
    shutil.copytree(sdxl_folder / "tokenizer", tmp_path / "words", dirs_exist_ok=True)
    names = {"vae": "vae", "text_encoder_2": "clip", "scheduler": "ddim", "tokenizer": "words"}
    pipeline = loaded(sdxl_folder, **{name: tmp_path / folder for name, folder in names.items()}).pipeline
    expected = DiffusionPipeline.from_pretrained(
        sdxl_folder,
        vae=diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae"),
        text_encoder_2=transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path / "clip"),
        scheduler=diffusers.DDIMScheduler.from_pretrained(tmp_path / "ddim"),
    )
    assert {n: type(part) for n, part in pipeline.components.items()} == {
        n: type(part) for n, part in expected.components.items()
    }
    torch.testing.assert_close(pictures(pipeline, "sdxl"), pictures(expected, "sdxl"), rtol=0, atol=0)


def test_variant_of_a_component_is_taken_if_there_is_one(sdxl_folder: Path, tmp_path: Path) -> None:
    other = vae().half().float()
    other.save_pretrained(tmp_path, variant="fp16")
    (folder := tmp_path / "model").mkdir()
    shutil.copytree(sdxl_folder, folder, dirs_exist_ok=True)
    diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").save_pretrained(folder / "unet", variant="fp16")
    paths = {"vae": str(tmp_path), "text_encoder": str(sdxl_folder)}
    model = load(configured(folder, component_paths=paths, source=SourceConfig(variant="fp16")))
    assert torch.equal(next(model.pipeline.vae.parameters()), next(other.parameters()))
    assert model.decisions["vae"] == f"fp32; AutoencoderKL from {tmp_path} (fp16)"


def test_component_of_another_model_is_found_in_its_place(sdxl_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(sdxl_folder, other)
    torch.manual_seed(8)
    clip().save_pretrained(other / "text_encoder")
    pipeline = loaded(sdxl_folder, text_encoder=other).pipeline
    ours, theirs = (
        next(transformers.CLIPTextModel.from_pretrained(place / "text_encoder").parameters())
        for place in (sdxl_folder, other)
    )
    assert torch.equal(next(pipeline.text_encoder.parameters()), theirs)
    assert not torch.equal(ours, theirs)


def test_component_of_another_class_than_the_index_names(sdxl_folder: Path, tmp_path: Path) -> None:
    sizes = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    diffusers.AutoencoderTiny(**sizes, **blocks).save_pretrained(tmp_path)
    assert type(loaded(sdxl_folder, vae=tmp_path).pipeline.vae) is diffusers.AutoencoderTiny
    described = describe(configured(sdxl_folder, component_paths={"vae": str(tmp_path)}))
    (part,) = [part for part in described.components if part.name == "vae"]
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert (part.class_name, part.size_bytes) == ("AutoencoderTiny", size)


def test_component_that_the_model_leaves_out_can_be_added(sdxl_folder: Path, tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    pipeline = loaded(sdxl_folder, image_encoder=tmp_path).pipeline
    assert type(pipeline.image_encoder) is transformers.CLIPVisionModelWithProjection


def test_component_that_a_pipeline_may_leave_out_comes_from_another_place(wan_folder: Path, tmp_path: Path) -> None:
    """It is loaded from the model, although it is given, unless it is asked by the pipeline's own class."""
    shutil.copytree(wan_folder, tmp_path, dirs_exist_ok=True)
    other = diffusers.WanTransformer3DModel.from_pretrained(wan_folder / "transformer")
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    pipeline = loaded(tmp_path, transformer=tmp_path / "other").pipeline
    assert torch.equal(next(pipeline.transformer.parameters()), next(other.parameters()))


def test_modular_pipeline_takes_components_from_other_places(modular_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(9)
    other = vae(1, shift_factor=0.1)
    other.save_pretrained(tmp_path)
    model = loaded(modular_folder, vae=tmp_path)
    assert torch.equal(next(model.pipeline.vae.parameters()), next(other.parameters()))
    assert model.decisions["vae"] == f"fp32; AutoencoderKL from {tmp_path}"
    assert model.pipeline.transformer is not None


def test_unknown_component_is_refused_with_those_there_are(sdxl_folder: Path) -> None:
    message = failure(sdxl_folder, component_paths={"transformer": "x"})
    assert "has no component 'transformer'; it has " in message
    assert "unet" in message


def test_places_without_the_component_are_told(sdxl_folder: Path, wan_folder: Path, tmp_path: Path) -> None:
    assert failure(sdxl_folder, component_paths={"vae": str(tmp_path)}).endswith("there is no config.json")
    assert failure(sdxl_folder, component_paths={"vae": "/no/where"}).endswith("and no such folder")
    assert failure(sdxl_folder, component_paths={"unet": str(wan_folder)}).endswith("that model has no unet")
    assert "it is a file" in failure(sdxl_folder, component_paths={"vae": str(sdxl_folder / INDEX_FILE)})
    (tmp_path / "config.json").write_text('{"_class_name": "NoSuchModel"}')
    assert failure(sdxl_folder, component_paths={"vae": str(tmp_path)}).startswith("vae can't be loaded from")
    (tmp_path / "config.json").write_text("no JSON")
    assert "config.json of" in failure(sdxl_folder, component_paths={"vae": str(tmp_path)})


def test_component_that_does_not_fit_its_pipeline_is_told(sdxl_folder: Path, tmp_path: Path) -> None:
    diffusers.DDIMScheduler().save_pretrained(tmp_path)
    index = json.loads((sdxl_folder / INDEX_FILE).read_text())
    (tmp_path / "config.json").write_text(json.dumps(index))
    assert "can't be loaded" in failure(sdxl_folder, component_paths={"unet": str(tmp_path)})


def test_what_is_learned_belongs_to_the_components(sdxl_folder: Path, tmp_path: Path) -> None:
    def name(**paths: Path) -> str:
        planned = plan(configured(sdxl_folder, component_paths={n: str(path) for n, path in paths.items()}))
        return VerdictFile(planned.source, planned.index, planned.components).name

    vae().save_pretrained(tmp_path)
    before = name(vae=tmp_path)
    assert before == name(vae=tmp_path) != name()
    vae(scaling_factor=0.5).save_pretrained(tmp_path)
    assert name(vae=tmp_path) not in (before, name())
