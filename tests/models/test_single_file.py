import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import BUILDERS, build
from safetensors.torch import load_file, save_file

from models.hub import running_hub
from sgld.config import EngineConfig, NoiseConfig, SourceConfig
from sgld.errors import ModelError
from sgld.models.describe import describe
from sgld.models.load import load
from sgld.models.plan import plan

pytestmark = pytest.mark.usefixtures("threads_as_before")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ltx")
    build("ltx")[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def configuration(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model without the weights of its denoiser."""
    folder = tmp_path_factory.mktemp("configuration") / "model"
    shutil.copytree(whole, folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    return folder


# As the authors of LTX name them.
_NAMES = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"}


@pytest.fixture(scope="module")
def checkpoint(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All weights of the denoiser in one file."""
    tensors = {}
    for name, tensor in load_file(whole / "transformer" / "diffusion_pytorch_model.safetensors").items():
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        tensors[f"model.diffusion_model.{name}"] = tensor
    file = tmp_path_factory.mktemp("file") / "model.safetensors"
    save_file(tensors, file)
    return file


def configured(path: Path | str, folder: Path | str | None, **config: Any) -> EngineConfig:
    source = SourceConfig(single_file_config=str(folder) if folder is not None else None)
    return EngineConfig(model_path=str(path), device="cpu", num_cpu_threads=1, source=source, **config)


def failure(path: Path | str, folder: Path | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        plan(configured(path, folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(pipeline: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    kwargs = BUILDERS["ltx"].kwargs
    made = pipeline(prompt="a red cat", num_inference_steps=2, output_type="pt", generator=generator, **kwargs)
    return torch.as_tensor(made.frames)


def test_file_with_a_configuration_is_the_model(whole: Path, configuration: Path, checkpoint: Path) -> None:
    model = load(configured(checkpoint, configuration, component_paths={"vae": str(whole)}))
    expected = pixels(DiffusionPipeline.from_pretrained(whole))
    torch.testing.assert_close(pixels(model.pipeline), expected, rtol=0, atol=0)
    assert model.decisions["model"] == f"weights from {checkpoint}; configuration from {configuration}"


def test_file_takes_another_noise_scheduler_and_tells_defaults(
    whole: Path, configuration: Path, checkpoint: Path
) -> None:
    noise = NoiseConfig(scheduler="UniPCMultistepScheduler", flow_shift=2)
    config = configured(checkpoint, configuration, component_paths={"vae": str(whole)}, noise=noise)
    assert load(config).pipeline.scheduler.config.flow_shift == 2
    assert describe(config).defaults["num_frames"].value == 161


def test_components_of_a_file_have_their_precisions(whole: Path, configuration: Path, checkpoint: Path) -> None:
    chosen: dict[str, Any] = {"component_paths": {"vae": str(whole)}, "dit_precision": "bf16", "vae_precision": "fp32"}
    model = load(configured(checkpoint, configuration, **chosen))
    precisions = model.info().precisions
    assert precisions == {"transformer": "bfloat16", "text_encoder": "bfloat16", "vae": "float32"}
    vae = DiffusionPipeline.from_pretrained(whole).vae
    assert torch.equal(next(model.pipeline.vae.parameters()), next(vae.parameters()))


def test_weights_that_are_nowhere_are_told(whole: Path, configuration: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(configuration, folder)
    (folder / "text_encoder" / "model.safetensors").unlink()
    config = configured(checkpoint, folder, component_paths={"vae": str(whole)})
    with pytest.raises(ModelError, match=r"^text_encoder can't be loaded from") as caught:
        load(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["me/mine/x/y.safetensors", "https://huggingface.co/me/mine/blob/main/x/y.safetensors"]
)
def test_file_on_the_hub_is_fetched(path: str, tmp_path: Path) -> None:
    (tmp_path / "mine" / "x").mkdir(parents=True)
    save_file({"weight": torch.zeros(1)}, tmp_path / "mine" / "x" / "y.safetensors")
    with running_hub(tmp_path / "hub") as hub:
        hub.put("me/mine", tmp_path / "mine")
        source = plan(configured(path, "sgld/tiny-image")).source
        assert failure("me/mine/z.safetensors").endswith("neither here nor on the hub")
    assert source.file is not None
    assert source.file.read_bytes() == (tmp_path / "mine" / "x" / "y.safetensors").read_bytes()


def test_kind_of_a_file_is_known_by_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = tmp_path / "xl.safetensors"
    save_file({"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": torch.zeros(1)}, file)
    message = failure(file)
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    assert message.startswith(f"model_index.json of {base} (else say with --single-file-config) can't be read")


def test_file_of_unknown_kind_asks_for_a_configuration(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert failure(tmp_path / "x.safetensors").endswith("say with --single-file-config what model it is of")


def test_files_that_are_no_models_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert failure(tmp_path / "none.safetensors") == f"there is no file '{tmp_path}/none.safetensors'"
    assert failure("me/mine/x.safetensors").endswith("neither here nor on the hub")
    assert "a model that is one file is .safetensors" in failure("model.ckpt")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    assert "junk.safetensors can't be read" in failure(tmp_path / "junk.safetensors")


def test_pipeline_that_no_single_file_makes_is_told(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match=r"PixArtSigmaPipeline isn't made from a single file"):
        load(configured(checkpoint, "sgld/tiny-image"))
