import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from pipelines.parts import vae

from sgld.config import EngineConfig, SourceConfig
from sgld.errors import ModelError
from sgld.models.load import load
from sgld.models.sources import ComponentClass, ComponentSource, class_of, find, own_code, with_variant

pytestmark = pytest.mark.usefixtures("threads_as_before")
AddToHub = Callable[[str, Path], None]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AddToHub:
    """Puts a folder where the hub's client keeps what it fetched of a repository; nothing else is reached."""
    root = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def add(repo_id: str, folder: Path) -> None:
        place = root / f"models--{repo_id.replace('/', '--')}"
        commit = "0" * 40
        shutil.copytree(folder, place / "snapshots" / commit)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(commit)

    return add


def write(folder: Path, file: str, content: dict[str, Any]) -> ComponentSource:
    (folder / file).write_text(json.dumps(content))
    return ComponentSource(str(folder))


# diffusers passes it to the hub's client.
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")
def test_component_from_the_hub(hub: AddToHub, sdxl_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    other = vae()
    other.save_pretrained(tmp_path / "vae")
    hub("me/vae", tmp_path / "vae")
    hub("me/model", sdxl_folder)
    paths = {"vae": "me/vae", "unet": "me/model"}
    model = load(EngineConfig(model_path=str(sdxl_folder), device="cpu", num_cpu_threads=1, component_paths=paths))
    assert torch.equal(next(model.pipeline.vae.parameters()), next(other.parameters()))
    assert model.decisions["unet"] == "fp32; UNet2DConditionModel from me/model/unet"


def test_model_in_a_subfolder_of_a_repository(hub: AddToHub, sdxl_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sdxl_folder, tmp_path / "repository" / "inner")
    hub("me/models", tmp_path / "repository")
    source = SourceConfig(model_subfolder="inner")
    model = load(EngineConfig(model_path="me/models", device="cpu", num_cpu_threads=1, source=source))
    own = AutoencoderKL.from_pretrained(sdxl_folder / "vae")
    assert torch.equal(next(model.pipeline.vae.parameters()), next(own.parameters()))


@pytest.mark.usefixtures("hub")
def test_repository_that_is_not_there_is_told() -> None:
    with pytest.raises(ModelError, match=r"vae can't be loaded from me/nothing: there is no config\.json, or the hub"):
        find("vae", "me/nothing", ComponentClass("diffusers", "AutoencoderKL"))


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
