import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipelines import build

from sgld.config import EngineConfig, NoiseConfig
from sgld.models.call_defaults import Default, call_defaults
from sgld.models.plan import plan
from sgld.models.resolve import DEFAULTS_FILE, INDEX_FILE


def saved(name: str, folder: Path) -> Any:
    pipeline = build(name)[0]
    pipeline.save_pretrained(folder)
    return pipeline


def found(folder: Path, **choices: Any) -> dict[str, Default]:
    return call_defaults(plan(EngineConfig(model_path=str(folder), device="cpu", noise=NoiseConfig(**choices))))


@pytest.mark.parametrize("name", ["sdxl", "sd", "sd3", "pixart", "cogvideox"])
def test_size_that_is_told_is_that_of_a_result(tmp_path: Path, name: str) -> None:
    pipeline = saved(name, tmp_path)
    told = found(tmp_path)
    by = f"computed by {type(pipeline).__name__}"
    assert (told["height"].origin, told["width"].origin) == (by, by)
    suits: dict[str, dict[str, Any]] = {
        "pixart": {"use_resolution_binning": False},
        "cogvideox": {"max_sequence_length": 16},
    }
    result = pipeline(prompt="a cat", num_inference_steps=1, output_type="np", **suits.get(name, {}))
    pixels = np.asarray(result.images if hasattr(result, "images") else result.frames)
    assert pixels.shape[-3:-1] == (told["height"].value, told["width"].value)
    if name == "cogvideox":
        assert (pixels.shape[1], told["num_frames"].origin) == (told["num_frames"].value, by)


def test_signature_says_the_rest(wan_folder: Path) -> None:
    told = found(wan_folder)
    assert told["num_inference_steps"] == Default(50, "signature of WanPipeline")
    assert (told["height"].value, told["width"].value, told["num_frames"].value) == (480, 832, 81)
    assert not {"prompt", "seed", "negative_prompt", "guidance_scale_2"} & told.keys()


def test_guidance_of_a_second_transformer_follows_from_the_first(tmp_path: Path) -> None:
    saved("wan_2_2", tmp_path)
    assert found(tmp_path)["guidance_scale_2"] == Default(5.0, "computed by WanPipeline")


def test_rate_has_the_client_s_name(tmp_path: Path) -> None:
    saved("ltx", tmp_path)
    assert found(tmp_path)["fps"] == Default(25, "signature of LTXPipeline")


def test_author_and_options_come_first(tmp_path: Path) -> None:
    saved("flux", tmp_path)
    (tmp_path / DEFAULTS_FILE).write_text('{"num_inference_steps": 4, "guidance_scale": 2}')
    assert found(tmp_path)["num_inference_steps"] == Default(4, DEFAULTS_FILE)
    assert found(tmp_path)["guidance_scale"] == Default(2, DEFAULTS_FILE)
    assert found(tmp_path, embedded_cfg_scale=6)["guidance_scale"] == Default(6, "embedded_cfg_scale")


def test_blocks_tell_of_modular_pipelines(modular_folder: Path) -> None:
    assert found(modular_folder)["num_inference_steps"] == Default(50, "blocks of FluxModularPipeline")


def test_code_that_comes_with_a_model_is_not_run(wan_folder: Path, tmp_path: Path) -> None:
    index = json.loads((wan_folder / INDEX_FILE).read_text()) | {"_class_name": ["pipeline", "OwnPipeline"]}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    (tmp_path / "pipeline.py").write_text("raise RuntimeError")
    config = EngineConfig(model_path=str(tmp_path), device="cpu", trust_remote_code=True)
    assert call_defaults(plan(config)) == {}


def test_configurations_that_are_missing_leave_only_the_signature(wan_folder: Path, tmp_path: Path) -> None:
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    assert {default.origin for default in found(tmp_path).values()} <= {
        *("signature of FluxPipeline", "computed by FluxPipeline")
    }
