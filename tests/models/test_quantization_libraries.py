"""Checkpoints that other libraries wrote, against diffusers alone. They are installed where .ci/run runs these tests:
importing diffusers imports them, too, which takes seconds.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, TorchAoConfig
from pipelines import BUILDERS, build

from sgld.config import EngineConfig, QuantizationConfig
from sgld.errors import ModelError
from sgld.models.load import LoadedModel, load
from sgld.testing import run_together

pytestmark = pytest.mark.usefixtures("threads_as_before")


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} isn't installed")


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    build("flux")[0].save_pretrained(folder)
    return folder


def loaded(folder: Path, component: Path | None = None, weights: Path | None = None, **config: Any) -> LoadedModel:
    return load(
        EngineConfig(
            model_path=str(folder),
            device="cpu",
            num_cpu_threads=1,
            component_paths={} if component is None else {"transformer": str(component)},
            quantized=QuantizationConfig(transformer_weights_path=None if weights is None else str(weights)),
            **config,
        )
    )


def calls(num_calls: int) -> list[dict[str, Any]]:
    given = {"num_inference_steps": 2, "output_type": "pt", **BUILDERS["flux"].kwargs}
    return [
        given | {"prompt": prompt, "generator": torch.Generator().manual_seed(seed)}
        for seed, prompt in enumerate(("a red cat", "a dog", "two birds")[:num_calls])
    ]


@needs("torchao")
@pytest.mark.parametrize("place", ["component", "weights"])
def test_torchao_folder_makes_the_picture_that_diffusers_makes(flux_folder: Path, tmp_path: Path, place: str) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    FluxTransformer2DModel.from_pretrained(
        flux_folder / "transformer",
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
        dtype=torch.bfloat16,
    ).save_pretrained(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(
        flux_folder,
        transformer=FluxTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16),
        dtype=torch.bfloat16,
    )
    model = loaded(flux_folder, **{place: tmp_path}, dit_precision="bf16", vae_precision="bf16")
    assert "torchao Int8WeightOnlyConfig, 8 bits (by config.json)" in model.decisions["transformer"]
    assert type(model.pipeline.transformer.transformer_blocks[0].attn.to_q.weight).__name__ == "Int8Tensor"
    expected = pipeline(**calls(1)[0]).images
    torch.testing.assert_close(model.pipeline(**calls(1)[0]).images, expected, rtol=0, atol=0)
    report = run_together(model.pipeline, calls(3))
    assert (report.mode, report.largest_batch) == ("merge", 3)
    torch.testing.assert_close(report.outputs[0].images, expected, rtol=0.05, atol=0.02)


@needs("bitsandbytes")
def test_bitsandbytes_needs_a_gpu(flux_folder: Path, tmp_path: Path) -> None:
    config = FluxTransformer2DModel.load_config(flux_folder / "transformer")
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    with pytest.raises(ModelError) as caught:
        loaded(flux_folder, component=tmp_path)
    message = "transformer is quantized with bitsandbytes (nf4), which runs on NVIDIA GPUs only, and the device is cpu"
    assert str(caught.value) == message
