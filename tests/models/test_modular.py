import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ModularPipeline
from engine.streams import completed, events_of
from own_code import copy_code

from sgld.config import EngineConfig, SourceConfig
from sgld.engine.engine import Engine
from sgld.errors import ModelError
from sgld.events import Failed, Progress
from sgld.models.load import load
from sgld.models.resolve import MODULAR_INDEX_FILE
from sgld.sampling_params import SamplingParams
from sgld.testing import InlineReplica

CHOICES: dict[str, Any] = {"height": 16, "width": 16, "max_sequence_length": 16, "num_inference_steps": 3}


@pytest.fixture
def moved(modular_folder: Path, tmp_path: Path) -> Path:
    """The folder at another place than that in its index."""
    folder = tmp_path / "moved"
    shutil.copytree(modular_folder, folder)
    index = json.loads((folder / MODULAR_INDEX_FILE).read_text())
    text = json.dumps(index).replace(str(modular_folder), "/nowhere/at/all")
    (folder / MODULAR_INDEX_FILE).write_text(text)
    return folder


def configured(folder: Path, **config: Any) -> EngineConfig:
    return EngineConfig(model_path=str(folder), device="cpu", num_cpu_threads=1, **config)


def loaded(folder: Path) -> Any:
    return load(configured(folder))


def test_modular_pipeline_is_loaded_from_a_folder_that_was_moved(moved: Path) -> None:
    model = loaded(moved)
    assert isinstance(model.pipeline, ModularPipeline)
    assert model.info().precisions["transformer"] == "float32"
    assert model.pipeline_for(["image"]) is model.pipeline


async def test_modular_pipeline_runs_in_the_engine(moved: Path) -> None:
    torch.set_num_threads(1)
    pipeline = loaded(moved).pipeline
    generator = torch.Generator().manual_seed(5)
    expected = pipeline(prompt="a red cat", generator=generator, output_type="pt", output="images", **CHOICES)
    config = EngineConfig(model_path=str(moved), device="cpu", num_cpu_threads=1)
    async with Engine(config, rank_factory=InlineReplica(pipeline)) as engine:
        events = await events_of(engine, SamplingParams(prompt="a red cat", seed=5, **CHOICES))
        bad = (await events_of(engine, SamplingParams(prompt="a cat", diffusers_kwargs={"heigth": 3})))[-1]
        done = await completed(engine, SamplingParams(prompt="a red cat", seed=6, **CHOICES))
    picture = (expected * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(events[-1].frames, picture)  # type: ignore[union-attr]
    assert not np.array_equal(done.frames, picture)
    assert isinstance(bad, Failed)
    assert "did you mean height?" in bad.message
    assert [(e.step, e.num_steps) for e in events if isinstance(e, Progress)][-1] == (3, 3)


def test_variant_of_a_component(moved: Path) -> None:
    other = AutoencoderKL.from_pretrained(moved / "vae").half().float()
    other.save_pretrained(moved / "vae", variant="fp16")
    chosen = load(configured(moved, source=SourceConfig(variant="fp16"))).pipeline.vae
    expected, plain = next(other.parameters()), next(load(configured(moved)).pipeline.vae.parameters())
    assert torch.equal(next(chosen.parameters()), expected)
    assert not torch.equal(plain, expected)


async def test_blocks_that_come_with_the_model(moved: Path) -> None:
    upright = load(configured(moved)).pipeline
    given = {"prompt": "a red cat", "output_type": "pt", "output": "images", **CHOICES}
    expected = upright(generator=torch.Generator().manual_seed(5), **given)
    copy_code("own_blocks", moved)
    auto_map = {"ModularPipelineBlocks": "own_blocks.OwnFluxBlocks"}
    (moved / "modular_config.json").write_text(json.dumps({"_class_name": "OwnFluxBlocks", "auto_map": auto_map}))
    with pytest.raises(ModelError, match=r"has blocks of its own, OwnFluxBlocks in own_blocks\.py; allow it with"):
        load(configured(moved))
    config = configured(moved, trust_remote_code=True)
    async with Engine(config, rank_factory=InlineReplica(None)) as engine:
        end = await completed(engine, SamplingParams(prompt="a red cat", seed=5, **CHOICES))
    picture = (expected.flip(-2) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(end.frames, picture)


def test_component_that_is_missing_is_named(moved: Path) -> None:
    shutil.rmtree(moved / "transformer")
    with pytest.raises(ModelError, match=r"components can't be had: transformer \(/nowhere/at/all\)"):
        loaded(moved)


def test_folder_without_any_index_is_refused(moved: Path) -> None:
    (moved / MODULAR_INDEX_FILE).unlink()
    with pytest.raises(ModelError, match=r"has no model_index\.json"):
        loaded(moved)
