"""Loads FP8 and int8 weights with scales, by the names of diffusers or of a model's authors."""

import json
import logging
from collections.abc import Collection
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES, _get_single_file_loadable_mapping_class
from safetensors.torch import load_file
from torch import Tensor, nn

from sgld.errors import ModelError
from sgld.models.linears import QuantizedLinear
from sgld.models.quantization import Activations, is_input_scale, is_weight_scale, of_layers
from sgld.models.weight_files import Weights

logger = logging.getLogger(__name__)
Named = dict[str, Tensor]
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
# Before the names of a denoiser's weights in files that hold a whole model.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def load_eight_bits(
    cls: Any, config: dict[str, Any], weights: Weights, activations: Activations, dtype: torch.dtype
) -> nn.Module:
    """A model of diffusers whose linear layers with such weights are quantized ones; what it lacks is on `meta`.

    :param config: of the model.
    :param dtype: in which it computes, and of all other weights.
    :raises ModelError: the weights aren't those of such a model, or quantized in a way that can't be loaded.
    """
    with init_empty_weights():
        model: nn.Module = cls.from_config(config)
    tensors = _of_denoiser({name: tensor for file in weights.files for name, tensor in load_file(file).items()})
    _check_markers(tensors)
    plain, scales, input_scales = _in_layout_of(model, cls, config, tensors, weights.name)
    in_full = getattr(cls, "_keep_in_fp32_modules", None) or []
    state: Named = {}
    for name, tensor in plain.items():
        wanted = torch.float32 if any(part in in_full for part in name.split(".")) else dtype
        scale = scales.get(name, torch.ones(1))
        if tensor.dtype not in _EIGHT_BITS:
            state[name] = tensor.to(wanted) if tensor.is_floating_point() else tensor
        elif _layer(model, name) is None or wanted != dtype:
            state[name] = tensor.to(wanted).mul_(scale.reshape(-1, *[1] * (tensor.ndim - 1)))
        else:
            bias = plain.get(name.removesuffix("weight") + "bias")
            own_bias = None if bias is None else bias.to(dtype)
            input_scale = input_scales[name].amax() if name in input_scales else None
            made = QuantizedLinear(tensor.contiguous(), scale, own_bias, input_scale=input_scale, dtype=dtype)
            model.set_submodule(name.removesuffix(".weight"), made)
    unused = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    if unused:
        logger.warning("%s: these weights are not used: %s", weights.name, ", ".join(unused))
    _set_activations(model, activations)
    return model


def _of_denoiser(tensors: Named) -> Named:
    """Without the prefix of its names, and what else is in a file that holds a whole model."""
    for prefix in _PREFIXES:
        inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if inside:
            return inside
    return tensors


def _layer(model: nn.Module, name: str) -> nn.Linear | None:
    """The linear layer that has this weight."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return module if leaf == "weight" and isinstance(module, nn.Linear) else None


def _check_markers(tensors: Named) -> None:
    """What ComfyUI notes of layers, as JSON in tensors, is looked at and taken out.

    :raises ModelError: a layer is quantized in a way that can't be loaded.
    """
    marks = [bytes(tensors.pop(name).tolist()) for name in list(tensors) if name.endswith(".comfy_quant")]
    if marks:
        of_layers(json.loads(mark)["format"] for mark in marks)
    tensors.pop("scaled_fp8", None)


def _in_layout_of(
    model: nn.Module, cls: Any, config: dict[str, Any], tensors: Named, asked: str
) -> tuple[Named, Named, Named]:
    """Weights, their scales (rows, 1) and the scales of activations (rows, 1) by the names of diffusers' weights."""
    scales: Named = {}
    input_scales: Named = {}
    for name in list(tensors):
        kept = scales if is_weight_scale(name) else input_scales if is_input_scale(name) else None
        if kept is not None:
            kept[f"{name.rpartition('.')[0]}.weight"] = tensors.pop(name).float()
    # Left behind by ModelOpt's calibration.
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith("_amax")}
    rows = {name: _by_rows(scale, plain[name]) for name, scale in scales.items() if name in plain}
    input_rows = {name: _by_rows(scale, plain[name]) for name, scale in input_scales.items() if name in plain}
    names = model.state_dict().keys()
    known = _get_single_file_loadable_mapping_class(cls)
    if known is None or names <= plain.keys():
        return plain, rows, input_rows
    convert = SINGLE_FILE_LOADABLE_CLASSES[known]["checkpoint_mapping_fn"]

    def converted(stand_ins: Named) -> Named:
        # Names of a model's authors. Layers are joined and divided along their rows, and scales in the place of
        # weights go the same way.
        try:
            return dict(convert(config=config, checkpoint=_prefixed(plain | stand_ins, known)))
        except (LookupError, AttributeError, ValueError, RuntimeError):
            is_ours = len(names & plain.keys()) > len(names) / 2
            missing = f"it has no {some(names - plain.keys())}" if is_ours else f"it has {some(plain)}"
            raise ModelError(f"{asked} doesn't fit {cls.__name__}: {missing}") from None

    weights = converted({})
    codes = {name for name, tensor in weights.items() if tensor.dtype in _EIGHT_BITS}
    # Where a layer has no scale its codes are still in that place.
    by_row, by_input = (
        {name: tensor for name, tensor in converted(of).items() if name in codes and tensor.dtype == torch.float32}
        for of in (rows, input_rows)
    )
    return weights, by_row, by_input


def _prefixed(tensors: Named, known: str) -> Named:
    """UNets are looked for among the weights of a whole model."""
    prefix = _PREFIXES[0] if known == "UNet2DConditionModel" else ""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _by_rows(scale: Tensor, weight: Tensor) -> Tensor:
    """A scale, of a tensor or of its rows, as one for each row."""
    return scale.reshape(-1, 1).expand(len(weight), 1)


def _set_activations(model: nn.Module, activations: Activations) -> None:
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            can = module.codes.dtype != torch.float8_e5m2 and (
                activations != "static" or module.input_scale is not None
            )
            module.activations = activations if can else "full"


def some(names: Collection[str]) -> str:
    """A few names, for a message."""
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
