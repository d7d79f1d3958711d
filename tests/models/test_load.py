import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLImg2ImgPipeline
from pipelines import build

from sgld.config import EngineConfig, SourceConfig
from sgld.errors import InvalidRequest, ModelError
from sgld.models.load import LoadedModel, load
from sgld.models.resolve import DEFAULTS_FILE, INDEX_FILE
from sgld.parallel import ParallelConfig

pytestmark = pytest.mark.usefixtures("threads_as_before")


def loaded(folder: Path, **config: Any) -> LoadedModel:
    return load(EngineConfig(model_path=str(folder), device="cpu", num_cpu_threads=1, **config))


def failure(folder: Path, **config: Any) -> str:
    """What is told of a model that can't be loaded; always in one line."""
    with pytest.raises(ModelError) as caught:
        loaded(folder, **config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_model_on_a_cpu_has_full_precision(sdxl_folder: Path) -> None:
    info = loaded(sdxl_folder).info()
    assert (info.model_path, info.pipeline_class, info.device) == (
        str(sdxl_folder),
        "StableDiffusionXLPipeline",
        "cpu",
    )
    assert info.precisions == dict.fromkeys(("unet", "vae", "text_encoder", "text_encoder_2"), "float32")
    assert torch.get_num_threads() == 1


def test_precision_of_the_vae_is_chosen_by_itself(sdxl_folder: Path) -> None:
    precisions = loaded(sdxl_folder, dit_precision="bf16", vae_precision="fp32").info().precisions
    assert (precisions["unet"], precisions["text_encoder"], precisions["vae"]) == ("bfloat16", "bfloat16", "float32")
    precisions = loaded(sdxl_folder, vae_precision="bf16").info().precisions
    assert (precisions["unet"], precisions["vae"]) == ("float32", "bfloat16")


def test_recommended_params_come_with_the_model(sdxl_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sdxl_folder, folder)
    assert loaded(folder).defaults == {}
    (folder / DEFAULTS_FILE).write_text('{"fps": 8, "height": 32}')
    model = loaded(folder)
    assert (model.defaults, model.info().fps) == ({"fps": 8, "height": 32}, 8)


def test_variant_and_subfolder_of_a_model(sdxl_folder: Path, tmp_path: Path) -> None:
    """Some components have weights of the variant, others only those without a name."""
    folder = tmp_path / "inner" / "model"
    shutil.copytree(sdxl_folder, folder)
    DiffusionPipeline.from_pretrained(folder).unet.half().float().save_pretrained(folder / "unet", variant="fp16")
    model = loaded(tmp_path, source=SourceConfig(model_subfolder="inner/model", variant="fp16"))
    assert model.decisions["model"] == "subfolder inner/model; variant fp16"
    expected = DiffusionPipeline.from_pretrained(folder, variant="fp16")
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = (
            torch.nn.utils.parameters_to_vector(getattr(p, name).parameters()) for p in (model.pipeline, expected)
        )
        assert torch.equal(ours, theirs)
    plain = next(loaded(folder).pipeline.unet.parameters())
    assert not torch.equal(plain, next(expected.unet.parameters()))
    assert "variant" in failure(folder, source=SourceConfig(variant="ema"))
    assert f"{tmp_path}/outer has no model_index.json" in failure(
        tmp_path, source=SourceConfig(model_subfolder="outer")
    )


def test_folder_without_a_model_is_told_in_one_line(tmp_path: Path) -> None:
    assert "has no model_index.json" in failure(tmp_path)


def test_broken_model_is_told_in_one_line(sdxl_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sdxl_folder, folder)
    index = json.loads((folder / INDEX_FILE).read_text())
    (folder / INDEX_FILE).write_text(json.dumps(index | {"_class_name": "NoSuchPipeline"}))
    assert "can't be loaded" in failure(folder)


@pytest.mark.parametrize("content", [b"", b"junk that is no weights", b"\xff" * 64])
def test_broken_weights_are_told_in_one_line(sdxl_folder: Path, tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sdxl_folder, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    assert "unet/diffusion_pytorch_model.safetensors can't be read: " in failure(folder)


def test_missing_weights_are_told_in_one_line(sdxl_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sdxl_folder, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "can't be loaded" in failure(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_told(sdxl_folder: Path) -> None:
    with pytest.raises(ModelError, match="torch finds no GPU here; use --device cpu or auto"):
        load(EngineConfig(model_path=str(sdxl_folder), device="cuda"))


def test_vae_decodes_in_tiles_and_slices_when_asked(sdxl_folder: Path) -> None:
    vae = loaded(sdxl_folder, vae_tiling=True, vae_slicing=True).pipeline.vae
    assert (vae.use_tiling, vae.use_slicing) == (True, True)
    vae = loaded(sdxl_folder).pipeline.vae
    assert (vae.use_tiling, vae.use_slicing) == (False, False)


def test_rank_without_a_vae_has_nothing_to_set_up(sdxl_folder: Path) -> None:
    parallel = ParallelConfig(enable_cfg_parallel=True, vae_sp=False)
    config = EngineConfig(
        model_path=str(sdxl_folder), device="cpu", num_cpu_threads=1, vae_tiling=True, parallel=parallel
    )
    assert load(config, 1).pipeline.vae is None


@pytest.mark.parametrize("name", ["sdxl", "modular"])
def test_rank_reads_no_weights_that_it_does_not_keep(
    name: str, sdxl_folder: Path, modular_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(sdxl_folder if name == "sdxl" else modular_folder, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("text_encoder*/*.safetensors"):
        file.unlink()
    model = load(
        EngineConfig(
            model_path=str(tmp_path),
            device="cpu",
            num_cpu_threads=1,
            parallel=ParallelConfig(enable_cfg_parallel=True),
        ),
        1,
    )
    kept = {name for name, part in model.pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert kept == model.sharing.names == {"unet" if name == "sdxl" else "transformer", "vae"}


def test_tiling_of_a_vae_that_has_none_is_refused(sdxl_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderKL

    def refuse(_vae: Any) -> None:
        raise NotImplementedError("Tiling doesn't seem to be implemented for AutoencoderKL.")

    # As the base class of all VAEs does for those that have none.
    monkeypatch.setattr(AutoencoderKL, "enable_tiling", refuse)
    message = failure(sdxl_folder, vae_tiling=True)
    assert message.startswith("enable_tiling is asked for, but AutoencoderKL of")


def test_sibling_has_the_settings_of_its_pipeline(sdxl_folder: Path) -> None:
    model = loaded(sdxl_folder)
    model.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert model.pipeline_for(["image"]).config.force_zeros_for_empty_prompt is False


def test_sibling_for_pictures_has_the_very_same_components(sdxl_folder: Path) -> None:
    model = loaded(sdxl_folder, dit_precision="bf16")
    sibling = model.pipeline_for(["image"])
    assert isinstance(sibling, StableDiffusionXLImg2ImgPipeline)
    for name, component in model.pipeline.components.items():
        assert getattr(sibling, name) is component
    assert sibling.unet.dtype is torch.bfloat16
    assert model.pipeline_for(["image"]) is sibling
    assert model.pipeline_for([]) is model.pipeline


def inline(name: str) -> LoadedModel:
    return LoadedModel(build(name)[0], torch.device("cpu"), {}, name)


def test_pipeline_that_takes_pictures_itself_has_no_sibling() -> None:
    model = inline("wan_i2v")
    assert model.pipeline_for(["image"]) is model.pipeline


@pytest.mark.parametrize(("name", "makes_videos"), [("pixart", False), ("wan", True), ("cogvideox", True)])
def test_who_makes_pictures_only_is_known(name: str, makes_videos: bool) -> None:
    assert inline(name).makes_videos == makes_videos


def test_pipeline_without_a_sibling_refuses_pictures() -> None:
    with pytest.raises(InvalidRequest, match="takes no input image, and has no image-to-image sibling") as caught:
        inline("cogvideox").pipeline_for(["image"])
    assert caught.value.param == "image_path"
