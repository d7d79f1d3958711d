import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sgld.errors import ModelError
from sgld.models.quantization import Family, Quantization, agreed, detect
from sgld.models.weight_files import Weights

FP8 = torch.float8_e4m3fn


def weights(folder: Path, tensors: dict[str, torch.Tensor], name: str = "w.safetensors", **metadata: Any) -> Weights:
    """A file of weights with this metadata, as JSON."""
    said = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    save_file(tensors, folder / name, metadata=said or None)
    return Weights(name, (folder / name,))


def declared(**config: Any) -> dict[str, Any]:
    return {"quantization_config": config}


def found(weights: Weights | None, config: dict[str, Any] | None = None) -> Quantization:
    result = detect(weights, config)
    assert result is not None
    return result


CODES = {"b.0.q.weight": torch.ones(4, 6, dtype=FP8)}


@pytest.mark.parametrize(
    ("tensors", "family", "detail", "activations"),
    [
        (CODES, "fp8", "without scales", "full"),
        (CODES | {"b.0.q.weight_scale": torch.ones(4)}, "fp8", "with scales of rows", "full"),
        (CODES | {"b.0.q.weight_scale": torch.ones(4, 1)}, "fp8", "with scales of rows", "full"),
        (CODES | {"b.0.q.weight_scale": torch.tensor(1.0)}, "fp8", "with scales of tensors", "full"),
        (CODES | {"b.0.q.scale_weight": torch.ones(1)}, "fp8", "with scales of tensors", "full"),
        (
            CODES | {"b.0.q.weight_scale": torch.ones(1), "b.0.q.input_scale": torch.ones(1)},
            "fp8",
            "with scales of tensors",
            "static",
        ),
        (
            {"q.weight": torch.ones(4, 6, dtype=torch.int8), "q.weight_scale": torch.ones(4, 1)},
            "int8",
            "with scales of rows",
            "full",
        ),
        (
            {"q.weight": torch.ones(4, 3, dtype=torch.uint8), "q.weight_scale": torch.ones(4, 1, dtype=FP8)},
            "nvfp4",
            "",
            "full",
        ),
        ({"q.qweight": torch.ones(2), "q.wscales": torch.ones(2)}, "svdquant", "of unknown rank", "full"),
        (
            {"q.weight": torch.ones(2), "q.weight.quant_state.bitsandbytes__nf4": torch.ones(2)},
            "bitsandbytes",
            "nf4",
            "full",
        ),
    ],
)
def test_tensors_tell(
    tmp_path: Path, tensors: dict[str, torch.Tensor], family: str, detail: str, activations: str
) -> None:
    result = found(weights(tmp_path, tensors))
    assert (result.family, result.detail, result.activations) == (family, detail, activations)
    assert result.found_in == "tensors"


def test_weights_in_full_precision_are_not_quantized(tmp_path: Path) -> None:
    assert detect(weights(tmp_path, {"q.weight": torch.ones(4, 6, dtype=torch.bfloat16)}), {}) is None
    assert detect(None, {"quantization_config": None}) is None


@pytest.mark.parametrize(
    ("name", "bits", "detail"),
    [
        ("flux-Q4_K_M.gguf", 4, "Q4_K_M"),
        ("flux1-dev-q8_0.gguf", 8, "Q8_0"),
        ("x.IQ3_XXS.gguf", 3, "IQ3_XXS"),
        ("x-BF16.gguf", 16, "BF16"),
        ("x.gguf", 8, "of some types"),
    ],
)
def test_gguf_is_known_by_its_name(tmp_path: Path, name: str, bits: int, detail: str) -> None:
    result = found(Weights(name, (tmp_path / name,)))
    assert (result.family, result.bits, result.detail) == ("gguf", bits, detail)


def test_svdquant_is_known_by_its_name(tmp_path: Path) -> None:
    result = found(weights(tmp_path, {"a": torch.ones(1)}, "svdq-int4_r32-qwen-image.safetensors"))
    assert (result.family, result.bits, result.detail) == ("svdquant", 4, "int4, rank 32")


AO_PER_ROW = {"_type": "Float8DynamicActivationFloat8WeightConfig", "_data": {"granularity": [{"_type": "PerRow"}]}}


@pytest.mark.parametrize(
    ("config", "family", "bits", "mixes_rows"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "bitsandbytes",
            4,
            False,
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes", 8, True),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0}, "bitsandbytes", 8, False),
        ({"load_in_4bit": True}, "bitsandbytes", 4, False),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
            "torchao",
            4,
            False,
        ),
        ({"quant_method": "torchao", "quant_type": {"default": AO_PER_ROW}}, "torchao", 8, False),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": AO_PER_ROW["_type"]}}},
            "torchao",
            8,
            True,
        ),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8", 8, False),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", 4, False),
        ({"quant_method": "modelopt", "quant_type": "FP8"}, "modelopt", 8, False),
        ({"quant_method": "quanto", "weights_dtype": "int8"}, "quanto", 8, False),
    ],
)
def test_config_tells(config: dict[str, Any], family: str, bits: int, mixes_rows: bool) -> None:
    result = found(None, declared(**config))
    assert (result.family, result.bits, result.mixes_rows) == (family, bits, mixes_rows)
    assert result.found_in == "config.json"


def test_config_goes_before_metadata_and_metadata_before_tensors(tmp_path: Path) -> None:
    by_bnb = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file = weights(tmp_path, CODES, quantization_config=by_bnb)
    assert found(file, declared(quant_method="torchao", quant_type={})).family == "torchao"
    assert found(file, {}).family == "bitsandbytes"
    layers = {"layers": {"b.0.q": {"format": "float8_e4m3fn"}}}
    file = weights(tmp_path, CODES, _quantization_metadata=layers, quantization_config=by_bnb)
    assert (found(file).family, found(file).found_in) == ("fp8", "metadata")
    assert found(weights(tmp_path, CODES, quantization_config="no JSON")).found_in == "tensors"


def test_activations_are_as_the_config_says_and_never_scaled_by_the_whole_batch(tmp_path: Path) -> None:
    file = weights(tmp_path, CODES | {"b.0.q.weight_scale": torch.ones(4)})
    assert found(file, declared(quant_method="fp8", activation_scheme="dynamic")).activations == "rows"
    # Static without the scales that it takes.
    assert found(file, declared(quant_method="fp8", activation_scheme="static")).activations == "full"
    assert found(file, declared(quant_method="modelopt", quant_algo="FP8")).activations == "full"


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"quant_method": "gptq"}, "has the quant_method 'gptq'; known are bitsandbytes, torchao"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "quant_algo 'MIXED_PRECISION' of ModelOpt"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "scales of blocks"),
    ],
)
def test_config_of_what_nobody_can_load_is_refused(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        detect(None, declared(**config))


@pytest.mark.parametrize(
    ("tensors", "metadata", "problem"),
    [
        (CODES | {"b.0.q.weight_scale_inv": torch.ones(1, 1)}, {}, "scales of blocks"),
        (CODES | {"b.0.q.weight_scale": torch.ones(4, 2)}, {}, "scales of blocks"),
        (
            CODES,
            {"_quantization_metadata": {"layers": {"q": {"format": "convrot_w4a4"}}}},
            "quantized as convrot_w4a4;",
        ),
        ({"q.x": torch.ones(1)}, {"tensor_names": "[]"}, "with torchao; name its folder"),
    ],
)
def test_weights_that_nobody_can_load_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ModelError, match=problem):
        detect(weights(tmp_path, tensors, **metadata), None)


def some(family: Family, **more: Any) -> Quantization:
    return Quantization(family, 8, "x", "tensors", **more)


@pytest.mark.parametrize(
    ("asked", "activations"), [("none", "full"), ("fp8", "full"), ("modelopt", "full"), ("fp8_dynamic", "rows")]
)
def test_what_is_asked_for_and_what_is_there_agree(asked: str, activations: str) -> None:
    result = agreed(asked, some("fp8"), "transformer")
    assert result is not None
    assert (result.family, result.activations, result.is_online) == ("fp8", activations, False)


@pytest.mark.parametrize(
    ("asked", "family", "activations"),
    [
        ("fp8", "fp8", "full"),
        ("fp8_dynamic", "fp8", "rows"),
        ("int8", "int8", "full"),
        ("int8_dynamic", "int8", "rows"),
    ],
)
def test_what_is_not_quantized_is_while_it_is_loaded(asked: str, family: str, activations: str) -> None:
    result = agreed(asked, None, "transformer")
    assert result is not None
    assert (result.family, result.activations, result.is_online) == (family, activations, True)


def test_what_is_asked_for_and_what_is_there_contradict_each_other() -> None:
    with pytest.raises(ModelError, match=r"^quantization is 'int8', but the weights of unet are gguf \(by tensors\)$"):
        agreed("int8", some("gguf"), "unet")
    with pytest.raises(ModelError, match="quantization is 'gguf', but the weights of unet aren't quantized at all"):
        agreed("gguf", None, "unet")
    assert agreed("none", None, "unet") is None
    assert agreed("modelopt_fp8", None, "transformer_2") is None


def test_notes_say_what_is_decided() -> None:
    assert some("bitsandbytes", mixes_rows=True).notes == (
        "bitsandbytes x, 8 bits (by tensors)",
        "its calls share no forward: activations are scaled by the whole batch",
    )
    assert some("fp8", activations="rows").notes == ("fp8 x, 8 bits (by tensors)", "activations in 8 bits, by rows")
