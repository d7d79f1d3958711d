"""Writes tiny checkpoints of each quantized kind, and says what weights they stand for."""

import json
from pathlib import Path
from typing import Any, Literal

import gguf
import torch
from diffusers.quantizers.bfl.utils import dequantize_nvfp4, quantize_nvfp4
from safetensors.torch import save_file
from torch import Tensor

from sgld.models.linears import fp8_rows

FP8 = torch.float8_e4m3fn
Named = dict[str, Tensor]
Scales = Literal["rows", "columns", "tensors", "none"]


def in_blocks(name: str, tensor: Tensor) -> bool:
    """Whether it is a weight that checkpoints have quantized: one of a linear layer in a block."""
    return ".weight" in name and tensor.ndim == 2 and any(part.isdigit() for part in name.split("."))


def fp8(tensors: Named, scales: Scales) -> tuple[Named, Named]:
    """A checkpoint with FP8 weights, and the weights in full precision that it stands for."""
    made, meant = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if not in_blocks(name, weight):
            continue
        codes, scale = fp8_rows(weight)
        if scales in ("tensors", "none"):
            scale = torch.ones(1, 1) if scales == "none" else weight.abs().amax().reshape(1, 1) / 448
            codes = (weight / scale).to(FP8)
        made[name], meant[name] = codes, codes.float() * scale
        shape = {"rows": (-1,), "columns": (-1, 1), "tensors": ()}.get(scales)
        if shape is not None:
            made[f"{name}_scale"] = scale.reshape(shape)
    return made, meant


def nvfp4(tensors: Named) -> tuple[Named, Named]:
    """A checkpoint with weights of four bits, as NVIDIA's Model Optimizer exports, and what it stands for."""
    made, meant = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if in_blocks(name, weight):
            codes, scale, second = quantize_nvfp4(weight)
            layer = name.removesuffix("weight")
            made |= {name: codes, f"{name}_scale": scale, f"{name}_scale_2": second, f"{layer}input_scale": second}
            meant[name] = dequantize_nvfp4(codes, scale, second)
    return {name: tensor.clone() for name, tensor in made.items()}, meant


def with_input_scales(made: Named, value: float) -> Named:
    """With a static scale of activations for each quantized layer."""
    layers = [name.removesuffix("weight_scale") for name in made if name.endswith(".weight_scale")]
    return made | {f"{layer}input_scale": torch.tensor(value) for layer in layers}


def write_folder(folder: Path, tensors: Named, config: dict[str, Any], **quantization: Any) -> Path:
    """A component's folder: its config with a quantization_config, and weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


def write_gguf(path: Path, tensors: Named, kind: str) -> Path:
    """Weights of blocks in a type of GGUF, others in full precision."""
    writer = gguf.GGUFWriter(path, "test")
    as_type = gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors.items():
        if in_blocks(name, tensor) and tensor.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), as_type), raw_dtype=as_type)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
