import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPAGPipeline
from own_code import copy_code
from pipelines import BUILDERS

from sgld.config import EngineConfig, SourceConfig
from sgld.errors import ModelError
from sgld.models.describe import describe
from sgld.models.load import load
from sgld.models.plan import plan
from sgld.models.resolve import INDEX_FILE

pytestmark = pytest.mark.usefixtures("threads_as_before")


def configured(folder: Path, *, is_trusted: bool = True, **source: Any) -> EngineConfig:
    return EngineConfig(
        model_path=str(folder),
        device="cpu",
        num_cpu_threads=1,
        trust_remote_code=is_trusted,
        source=SourceConfig(**source),
    )


def picture(pipeline: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    kwargs = BUILDERS["flux"].kwargs
    made = pipeline(prompt="a red cat", num_inference_steps=2, output_type="pt", generator=generator, **kwargs)
    return torch.as_tensor(made.images)


def failure(config: EngineConfig) -> str:
    with pytest.raises(ModelError) as caught:
        plan(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pipeline_class_from_the_folder_of_the_model(flux_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(flux_folder, folder)
    index = json.loads((folder / INDEX_FILE).read_text())
    (folder / INDEX_FILE).write_text(json.dumps(index | {"_class_name": ["pipeline", "UpsideDownPipeline"]}))
    assert "UpsideDownPipeline in pipeline.py; allow it with --trust" in failure(configured(folder, is_trusted=False))
    assert "has no pipeline.py" in failure(configured(folder))
    copy_code("pipeline", folder)
    model = load(configured(folder))
    upright = picture(DiffusionPipeline.from_pretrained(flux_folder))
    assert model.info().pipeline_class == describe(configured(folder)).pipeline_class == "UpsideDownPipeline"
    torch.testing.assert_close(picture(model.pipeline), upright.flip(-2), rtol=0, atol=0)


def test_pipeline_code_from_another_folder(flux_folder: Path, tmp_path: Path) -> None:
    assert failure(configured(flux_folder, custom_pipeline=str(tmp_path))) == f"{tmp_path} has no pipeline.py"
    copy_code("pipeline", tmp_path)
    model = load(configured(flux_folder, custom_pipeline=str(tmp_path)))
    code = {"custom_pipeline": str(tmp_path), "trust_remote_code": True}
    expected = picture(DiffusionPipeline.from_pretrained(flux_folder, **code))
    torch.testing.assert_close(picture(model.pipeline), expected, rtol=0, atol=0)
    assert model.decisions["model"] == f"pipeline code from {tmp_path}"


@pytest.mark.parametrize("name", ["lpw_stable_diffusion", "somebody/their-pipeline", "/a/folder"])
def test_code_from_elsewhere_needs_trust(flux_folder: Path, name: str) -> None:
    message = failure(configured(flux_folder, is_trusted=False, custom_pipeline=name))
    assert message == f"the pipeline {name} is code from outside of diffusers; allow it with --trust-remote-code"


def test_another_class_for_the_same_components(sdxl_folder: Path) -> None:
    model = load(configured(sdxl_folder, pipeline_class_name="StableDiffusionXLPAGPipeline"))
    assert type(model.pipeline) is StableDiffusionXLPAGPipeline
    assert model.decisions["model"] == "pipeline class StableDiffusionXLPAGPipeline"
    other = model.verdict_file
    assert other is not None
    assert other.name != load(configured(sdxl_folder)).info().identity


def test_class_that_needs_other_components_is_told(sdxl_folder: Path) -> None:
    with pytest.raises(ModelError, match="can't be loaded: ") as caught:
        load(configured(sdxl_folder, pipeline_class_name="StableDiffusionXLControlNetPipeline"))
    assert "\n" not in str(caught.value)


def test_class_that_diffusers_lacks_is_refused(sdxl_folder: Path) -> None:
    message = failure(configured(sdxl_folder, pipeline_class_name="StableDiffusionXlPipeline"))
    assert "did you mean StableDiffusionXLPipeline?" in message
    assert "diffusers has no pipeline 'UNet2DModel'" in failure(
        configured(sdxl_folder, pipeline_class_name="UNet2DModel")
    )


def test_class_is_chosen_once(sdxl_folder: Path, modular_folder: Path) -> None:
    both = configured(sdxl_folder, pipeline_class_name="FluxPipeline", custom_pipeline="x")
    assert "can't be given together" in failure(both)
    assert "is a modular pipeline" in failure(configured(modular_folder, pipeline_class_name="FluxPipeline"))
