import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sgld.config import EngineConfig
from sgld.errors import ModelError
from sgld.models.call_defaults import Default
from sgld.models.describe import Component, Description, describe
from sgld.models.resolve import DEFAULTS_FILE, INDEX_FILE, model_index, resolve
from sgld.models.verdicts import Kept, VerdictFile


def described(folder: Path, **config: Any) -> Description:
    return describe(EngineConfig(model_path=str(folder), device="cpu", **config))


def test_components_of_a_folder_have_sizes_and_precisions(sdxl_folder: Path) -> None:
    description = described(sdxl_folder)
    components = {component.name: component for component in description.components}
    assert description.pipeline_class == "StableDiffusionXLPipeline"
    assert set(components) == {
        *("unet", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    }
    unet = components["unet"]
    assert (unet.library, unet.class_name, unet.dtype) == ("diffusers", "UNet2DConditionModel", "F32")
    assert unet.size_bytes == sum(path.stat().st_size for path in (sdxl_folder / "unet").iterdir())
    assert components["scheduler"].dtype is None


def folder_with(tmp_path: Path, index: dict[str, Any]) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return folder


def test_precision_is_that_of_most_weights(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"_class_name": "P", "unet": ["diffusers", "U"]})
    (folder / "unet").mkdir()
    weights = {"a": torch.ones(9, dtype=torch.bfloat16), "b": torch.ones(2)}
    save_file(weights, folder / "unet" / "model.safetensors", metadata={"format": "pt"})
    (component,) = described(folder).components
    assert component.dtype == "BF16"


def test_components_that_a_model_leaves_out_are_not_listed(tmp_path: Path) -> None:
    index = {"_class_name": "P", "image_encoder": [None, None], "is_fast": True, "vae": ["diffusers", "V"]}
    description = described(folder_with(tmp_path, index))
    assert description.components == (Component("vae", "diffusers", "V", 0, None),)


def test_pipeline_of_a_model_with_code_of_its_own(tmp_path: Path) -> None:
    index = {"_class_name": ["pipeline", "OwnPipeline"], "vae": ["diffusers", "V"]}
    folder = folder_with(tmp_path, index)
    (folder / "pipeline.py").touch()
    description = described(folder, trust_remote_code=True)
    assert description.pipeline_class == "OwnPipeline"
    assert [component.name for component in description.components] == ["vae"]


def test_index_without_a_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="names no pipeline class"):
        described(folder_with(tmp_path, {"vae": ["diffusers", "V"]}))


def test_recommended_params_and_proved_modes_are_told(sdxl_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sdxl_folder, folder)
    (folder / DEFAULTS_FILE).write_text('{"num_inference_steps": 7}')
    source = resolve(str(folder))
    VerdictFile(source, model_index(source)).write(Kept(modes={"unet": "merge"}))
    description = described(folder)
    assert description.defaults["num_inference_steps"] == Default(7, DEFAULTS_FILE)
    assert description.modes == {"unet": "merge"}


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" * 16, b"\x05" + b"\0" * 7 + b"{abc}"])
def test_weights_that_can_not_be_read_are_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    folder = folder_with(tmp_path, {"_class_name": "P", "unet": ["diffusers", "U"]})
    (folder / "unet").mkdir()
    (folder / "unet" / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors") as caught:
        described(folder)
    assert "\n" not in str(caught.value)
