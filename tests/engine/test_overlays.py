"""Overlays up to their pictures: a real rank makes the model and runs it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pipelines import build

from engine.preloaded import preloaded_rank
from engine.streams import PROMPT, completed, difference, params_of, plain
from sgld.config import EngineConfig
from sgld.engine.engine import Engine
from sgld.errors import ModelError
from sgld.models.load import load
from sgld.models.manifest import MANIFEST_FILE
from sgld.models.resolve import INDEX_FILE

# As no pipeline of diffusers: it adds to the prompt.
OWN_PIPELINE = """
from functools import wraps

from diffusers import PixArtSigmaPipeline


class SnowPipeline(PixArtSigmaPipeline):
    @wraps(PixArtSigmaPipeline.__call__)
    def __call__(self, prompt=None, **kwargs):
        return super().__call__(prompt + " in the snow", **kwargs)
"""


@pytest.fixture(scope="module")
def pixart() -> tuple[Any, dict[str, Any]]:
    return build("pixart")


@pytest.fixture
def overlay(tmp_path: Path, pixart: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An overlay for a model that lies otherwise than diffusers has it."""
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    source, folder = tmp_path / "raw", tmp_path / "overlay"
    pixart[0].save_pretrained(source)
    (folder / "_overlay").mkdir(parents=True)
    for name in (INDEX_FILE, "scheduler", "tokenizer", "vae/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.move(source / name, folder / name)
    (source / "transformer").rename(source / "dit")
    manifest = {
        "source_model_id": str(source),
        "required_source_files": ["dit/config.json"],
        "file_mappings": [
            {"type": "tree", "src": "dit", "dst_dir": "transformer"},
            {"type": "glob", "src": "text_encoder/*"},
            {"src": "vae/diffusion_pytorch_model.safetensors", "dst": "vae/diffusion_pytorch_model.safetensors"},
        ],
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return folder


def config(overlay: Path, **choices: Any) -> EngineConfig:
    return EngineConfig(model_path=str(overlay), device="cpu", num_cpu_threads=1, **choices)


def test_made_model_gives_the_picture_of_the_original(overlay: Path, pixart: Any) -> None:
    params = params_of(pixart[1])
    model = load(config(overlay))
    model.pipeline.set_progress_bar_config(disable=True)
    assert difference(plain(model.pipeline, params), plain(pixart[0], params)) == 0
    assert model.info().decisions["model"].startswith("materialised from overlay")


async def test_pipeline_that_comes_with_an_overlay_runs_when_it_is_trusted(overlay: Path, pixart: Any) -> None:
    index = json.loads((overlay / INDEX_FILE).read_text())
    (overlay / INDEX_FILE).write_text(json.dumps(index | {"_class_name": ["pipeline", "SnowPipeline"]}))
    (overlay / "pipeline.py").write_text(OWN_PIPELINE)
    params = params_of(pixart[1])
    with pytest.raises(ModelError, match=r"pipeline\.py"):
        load(config(overlay))
    async with Engine(config(overlay, trust_remote_code=True), rank_factory=preloaded_rank) as engine:
        frames = (await completed(engine, params)).frames
        assert engine.model is not None
        assert engine.model.pipeline_class == "SnowPipeline"
    expected = plain(pixart[0], params_of(pixart[1], prompt=f"{PROMPT} in the snow"))
    assert difference(frames, expected) == 0
    assert difference(frames, plain(pixart[0], params)) > 0
