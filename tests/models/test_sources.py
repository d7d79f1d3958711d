import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoModel

from models.hub import Hub, running_hub
from sgld.config import EngineConfig, SourceConfig
from sgld.errors import ModelError
from sgld.models.load import load
from sgld.models.plan import plan
from sgld.models.sources import ComponentClass, ComponentSource, class_of, find, own_code, with_variant

pytestmark = pytest.mark.usefixtures("threads_as_before")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path / "hub") as hub:
        yield hub


def write(folder: Path, file: str, content: dict[str, Any]) -> ComponentSource:
    (folder / file).write_text(json.dumps(content))
    return ComponentSource(str(folder))


def configured(model_path: Path | str, **config: Any) -> EngineConfig:
    return EngineConfig(model_path=str(model_path), device="cpu", num_cpu_threads=1, **config)


# diffusers passes it to the hub's client.
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")
def test_components_from_the_hub(hub: Hub, flux2_folder: Path, tiny_autoencoder: Path) -> None:
    """One with code of its own, as fal/FLUX.2-Tiny-AutoEncoder, and one in the place of a model."""
    hub.put("fal/FLUX.2-Tiny-AutoEncoder", tiny_autoencoder)
    hub.put("me/model", flux2_folder)
    paths = {"vae": "fal/FLUX.2-Tiny-AutoEncoder", "transformer": "me/model"}
    model = load(configured(flux2_folder, component_paths=paths, trust_remote_code=True))
    own = AutoModel.from_pretrained(str(tiny_autoencoder), trust_remote_code=True)
    assert torch.equal(next(model.pipeline.vae.parameters()), next(own.parameters()))
    assert model.decisions["vae"] == "fp32; Flux2TinyAutoEncoder from fal/FLUX.2-Tiny-AutoEncoder"
    assert model.decisions["transformer"] == "fp32; Flux2Transformer2DModel from me/model/transformer"
    # Nothing of that model but what is used.
    assert not [name for name in hub.asked if name.startswith("model/text_encoder")]
    with pytest.raises(ModelError, match=r"is code of its own \(Flux2TinyAutoEncoder\); allow it with"):
        plan(configured(flux2_folder, component_paths=paths))


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")
def test_model_in_a_subfolder_of_a_repository(hub: Hub, sdxl_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sdxl_folder, tmp_path / "repository" / "inner")
    (tmp_path / "repository" / "other.txt").write_text("not fetched")
    hub.put("me/models", tmp_path / "repository", "v1")
    source = SourceConfig(model_subfolder="inner")
    model = load(configured("me/models", source=source, revision="v1"))
    own = AutoencoderKL.from_pretrained(sdxl_folder / "vae")
    assert torch.equal(next(model.pipeline.vae.parameters()), next(own.parameters()))
    assert "models/other.txt" not in hub.asked
    with pytest.raises(ModelError, match=r"model_index\.json of me/models can't be read"):
        plan(configured("me/models", source=source, revision="v2"))


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")
def test_pipeline_code_from_the_hub(hub: Hub, sdxl_folder: Path, tmp_path: Path) -> None:
    code = "from diffusers import StableDiffusionXLPipeline\n\nclass Own(StableDiffusionXLPipeline): ...\n"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "pipeline.py").write_text(code)
    hub.put("me/code", tmp_path / "code")
    source = SourceConfig(custom_pipeline="me/code")
    model = load(configured(sdxl_folder, source=source, trust_remote_code=True))
    assert type(model.pipeline).__name__ == "Own"


def test_places_on_the_hub_without_the_component_are_told(hub: Hub, sdxl_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").touch()
    hub.put("me/empty", tmp_path / "empty")
    hub.put("me/model", sdxl_folder)
    with pytest.raises(ModelError, match=r"vae can't be loaded from me/empty: there is no config\.json"):
        find("vae", "me/empty", KL)
    with pytest.raises(ModelError, match=r"transformer can't be loaded from me/model: that model has no transformer"):
        find("transformer", "me/model", ComponentClass("diffusers", "FluxTransformer2DModel"))
    with pytest.raises(ModelError, match="of me/nothing can't be read") as caught:
        find("vae", "me/nothing", KL)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")
def test_hub_that_goes_away_is_told_in_one_line(
    hub: Hub, flux2_folder: Path, tiny_autoencoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("me/vae", tiny_autoencoder)
    # Nobody listens there; the version of code is asked for at each start.
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    config = configured(flux2_folder, component_paths={"vae": "me/vae"}, trust_remote_code=True)
    with pytest.raises(ModelError, match="vae can't be loaded from me/vae: ") as caught:
        load(config)
    assert "\n" not in str(caught.value)


KL = ComponentClass("diffusers", "AutoencoderKL")
CLIP = ComponentClass("transformers", "CLIPTextModel")


@pytest.mark.parametrize(
    ("named", "file", "content", "expected"),
    [
        (KL, "config.json", {"_class_name": "AutoencoderTiny"}, ComponentClass("diffusers", "AutoencoderTiny")),
        (KL, "config.json", {"auto_map": {"AutoModel": "a.B"}}, ComponentClass("diffusers", "B", "AutoModel", "a")),
        (
            CLIP,
            "config.json",
            {"model_type": "clip_text_model", "architectures": ["CLIPTextModelWithProjection"]},
            CLIP,
        ),
        (
            CLIP,
            "config.json",
            {"model_type": "t5", "architectures": ["T5Model"]},
            ComponentClass("transformers", "T5Model"),
        ),
        (
            CLIP,
            "config.json",
            {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "a.B"}},
            ComponentClass("transformers", "B", "AutoModelForCausalLM", "a"),
        ),
        (
            ComponentClass("transformers", "CLIPTokenizer"),
            "tokenizer_config.json",
            {"tokenizer_class": "T5Tokenizer"},
            ComponentClass("transformers", "T5Tokenizer"),
        ),
        (
            ComponentClass("transformers", "CLIPTokenizer"),
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": [None, "a.B"]}},
            ComponentClass("transformers", "B", "AutoTokenizer", "a"),
        ),
        (
            ComponentClass("diffusers", "DDIMScheduler"),
            "scheduler_config.json",
            {"_class_name": "DDPMScheduler"},
            ComponentClass("diffusers", "DDPMScheduler"),
        ),
        (
            None,
            "preprocessor_config.json",
            {"image_processor_type": "CLIPImageProcessor"},
            ComponentClass("transformers", "CLIPImageProcessor"),
        ),
    ],
)
def test_files_of_a_component_say_of_which_class_it_is(
    named: ComponentClass | None, file: str, content: dict[str, Any], expected: ComponentClass, tmp_path: Path
) -> None:
    assert class_of("part", write(tmp_path, file, content), named) == expected


def test_component_whose_class_nobody_names_is_refused(tmp_path: Path) -> None:
    assert class_of("part", write(tmp_path, "config.json", {}), KL) == KL
    with pytest.raises(ModelError, match=r"part can't be loaded from .* its files don't name its class"):
        class_of("part", ComponentSource(str(tmp_path)), None)


def test_code_of_a_component_is_seen(tmp_path: Path, tiny_autoencoder: Path) -> None:
    assert own_code(ComponentSource(str(tmp_path))) is None
    assert own_code(ComponentSource(str(tiny_autoencoder))) == ComponentClass(
        "diffusers", "Flux2TinyAutoEncoder", "AutoModel", "flux2_tiny_autoencoder"
    )


def test_variant_is_that_of_weights_that_are_there(tmp_path: Path) -> None:
    source = ComponentSource(str(tmp_path))
    assert with_variant(source, "fp16") == source
    (tmp_path / "model.fp16.safetensors").touch()
    assert with_variant(source, "fp16").variant == "fp16"
    assert str(with_variant(source, "fp16")) == f"{tmp_path} (fp16)"
    assert with_variant(source, "ema") == source
