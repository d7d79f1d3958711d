"""Loads weights that lie apart from their component or are quantized, and quantizes what is not."""

import json
import logging
import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from diffusers import BFLQuantizationConfig, GGUFQuantizationConfig
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from diffusers.loaders.single_file_model import (
    SINGLE_FILE_LOADABLE_CLASSES,
    FromOriginalModelMixin,
    _get_single_file_loadable_mapping_class,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from sgld.config import QuantizationConfig
from sgld.errors import ModelError
from sgld.models.linears import QuantizedLinear, quantized
from sgld.models.quantization import MIXES_ROWS, OWN, Quantization, is_input_scale, is_weight_scale, of_layers
from sgld.models.weight_files import Weights, read_header

logger = logging.getLogger(__name__)
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
# Before the names of a denoiser's weights in files that hold a whole model.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def load_weights(
    cls: Any, base: Mapping[str, Any], weights: Weights, found: Quantization | None, dtype: torch.dtype
) -> nn.Module:
    """A component of diffusers with these weights, on the CPU, or where its library puts it.

    :param base: the config of the component that the weights are for.
    :param dtype: in which it computes.
    :raises ModelError: the weights don't fit, or there is no way to load them.
    """
    config = {name: value for name, value in base.items() if name != "quantization_config"}
    family = found.family if found is not None else None
    if family in OWN:
        model = _load_own(cls, config, weights, dtype)
        _set_activations(model, found.activations if found is not None else "full")
    elif family == "svdquant":
        model = _load_nunchaku(cls, weights, dtype)
    else:
        model = _load_with_diffusers(cls, config, weights, found, dtype)
    missing = [name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"]
    if missing:
        raise ModelError(f"{weights.name} doesn't fit {cls.__name__}: it has no {_some(missing)}")
    return model.eval()


def _some(names: Collection[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _load_with_diffusers(
    cls: Any, config: dict[str, Any], weights: Weights, found: Quantization | None, dtype: torch.dtype
) -> nn.Module:
    """By diffusers' loaders, from a folder made for them: links to the weights, and the config."""
    of_file = {"gguf": GGUFQuantizationConfig, "nvfp4": BFLQuantizationConfig}.get(found.family if found else "")
    is_single = len(weights.files) == 1 and issubclass(cls, FromOriginalModelMixin)
    if of_file is not None and not is_single:
        raise ModelError(f"{weights.name}: diffusers reads such weights from one file, and not for {cls.__name__}")
    if found is not None and found.config is not None:
        config = config | {"quantization_config": dict(found.config)}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "config.json").write_text(json.dumps(config, default=str))
        if is_single and (found is None or of_file is not None):
            given = {"quantization_config": of_file(compute_dtype=dtype)} if of_file is not None else {}
            # It knows the names that the authors of models give to their weights.
            return cls.from_single_file(str(weights.files[0]), config=str(folder), dtype=dtype, **given)  # type: ignore[no-any-return]
        _link(weights, folder)
        return cls.from_pretrained(str(folder), dtype=dtype)  # type: ignore[no-any-return]


def _link(weights: Weights, folder: Path) -> None:
    """The weights under the names that diffusers looks for."""
    stem = "diffusion_pytorch_model"
    if len(weights.files) == 1:
        (folder / f"{stem}.safetensors").symlink_to(weights.files[0].resolve())
        return
    places: dict[str, str] = {}
    for number, file in enumerate(weights.files, start=1):
        name = f"{stem}-{number:05}-of-{len(weights.files):05}.safetensors"
        (folder / name).symlink_to(file.resolve())
        places |= dict.fromkeys(read_header(file).tensors, name)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _load_nunchaku(cls: Any, weights: Weights, dtype: torch.dtype) -> nn.Module:
    """By nunchaku, which has classes of its own for some models: FluxTransformer2DModel is NunchakuFlux..."""
    import nunchaku

    classes = {name.lower(): name for name in dir(nunchaku)}
    name = classes.get(f"nunchaku{cls.__name__}".lower())
    if name is None:
        has = ", ".join(sorted(n for n in classes.values() if n.startswith("Nunchaku") and "Transformer" in n))
        raise ModelError(f"nunchaku has no {cls.__name__}; it has {has}")
    return getattr(nunchaku, name).from_pretrained(str(weights.files[0]), torch_dtype=dtype)  # type: ignore[no-any-return]


def _load_own(cls: Any, config: dict[str, Any], weights: Weights, dtype: torch.dtype) -> nn.Module:
    """FP8 and int8: the layers with such weights become quantized ones."""
    with init_empty_weights():
        model: nn.Module = cls.from_config(config)
    tensors = {_own_name(name): tensor for file in weights.files for name, tensor in load_file(file).items()}
    _check_markers(tensors)
    plain, scales, input_scales = _in_layout_of(model, cls, config, tensors, weights.name)
    in_full = getattr(cls, "_keep_in_fp32_modules", None) or []
    state: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        wanted = torch.float32 if any(part in in_full for part in name.split(".")) else dtype
        layer = _layer(model, name)
        if tensor.dtype not in _EIGHT_BITS:
            state[name] = tensor.to(wanted) if tensor.is_floating_point() else tensor
        elif layer is None or wanted != dtype:
            state[name] = tensor.to(wanted).mul_(scales.get(name, torch.ones(1)))
        else:
            bias = plain.get(name.removesuffix("weight") + "bias")
            made = QuantizedLinear(
                tensor.contiguous(),
                scales.get(name, torch.ones(1)),
                None if bias is None else bias.to(wanted),
                input_scale=input_scales[name].amax() if name in input_scales else None,
                dtype=dtype,
            )
            model.set_submodule(name.removesuffix(".weight"), made)
    unused = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    if unused:
        logger.warning("%s: these weights are not used: %s", weights.name, ", ".join(unused))
    return model


def _own_name(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)


def _layer(model: nn.Module, name: str) -> nn.Linear | None:
    """The linear layer that has this weight."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return module if leaf == "weight" and isinstance(module, nn.Linear) else None


def _check_markers(tensors: dict[str, Tensor]) -> None:
    """What ComfyUI notes of layers, as JSON in tensors, is looked at and taken out.

    :raises ModelError: a layer is quantized in a way that can't be loaded.
    """
    marks = [bytes(tensors.pop(name).tolist()) for name in list(tensors) if name.endswith(".comfy_quant")]
    if marks:
        of_layers(json.loads(mark)["format"] for mark in marks)
    tensors.pop("scaled_fp8", None)


Named = dict[str, Tensor]


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
            return dict(convert(config=config, checkpoint=plain | stand_ins))
        except (LookupError, AttributeError, ValueError, RuntimeError):
            is_ours = len(names & plain.keys()) > len(names) / 2
            missing = f"it has no {_some(names - plain.keys())}" if is_ours else f"it has {_some(plain)}"
            raise ModelError(f"{asked} doesn't fit {cls.__name__}: {missing}") from None

    weights = converted({})
    codes = {name for name, tensor in weights.items() if tensor.dtype in _EIGHT_BITS}
    # Where a layer has no scale its codes are still in that place.
    by_row, by_input = (
        {name: tensor for name, tensor in converted(of).items() if name in codes and tensor.dtype == torch.float32}
        for of in (rows, input_rows)
    )
    return weights, by_row, by_input


def _by_rows(scale: Tensor, weight: Tensor) -> Tensor:
    """A scale, of a tensor or of its rows, as one for each row."""
    return scale.reshape(-1, 1).expand(len(weight), 1)


def _set_activations(model: nn.Module, activations: Any) -> None:
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            can = module.codes.dtype != torch.float8_e5m2 and (
                activations != "static" or module.input_scale is not None
            )
            module.activations = activations if can else "full"


def quantize(model: nn.Module, found: Quantization, ignored: Collection[str], device: torch.device) -> int:
    """Quantize the linear layers of a model one by one; each is on the device only as long as that takes.

    Left as they are: what is outside of repeated blocks, and what diffusers itself keeps in full precision where it
    stores models in FP8.

    :param ignored: parts of names of layers that are left as they are, too.
    :return: how many layers it was.
    """
    own: Any = model
    kept = (*DEFAULT_SKIP_MODULES_PATTERN, *(getattr(own, "_skip_layerwise_casting_patterns", None) or ()))
    in_full = getattr(own, "_keep_in_fp32_modules", None) or ()
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and name.startswith(lists)
        and not any(re.search(pattern, name) for pattern in kept)
        and not any(part in in_full for part in name.split("."))
        and not any(part in name for part in ignored)
    ]
    bits: Any = found.family
    for name in names:
        linear: Any = model.get_submodule(name)
        home = linear.weight.device
        model.set_submodule(name, quantized(linear.to(device), bits, found.activations).to(home))
    return len(names)


class Part(Protocol):
    """A component as far as it matters here."""

    @property
    def name(self) -> str: ...

    @property
    def quantization(self) -> Quantization | None: ...


def quantize_components(
    parts: Collection[Part], components: Mapping[str, Any], config: QuantizationConfig, device: torch.device
) -> dict[str, str]:
    """Quantize what is to be, and mark what must not share forwards.

    :return: what was done, for people, by component.
    :raises ModelError: a component has no layer that can be quantized.
    """
    said: dict[str, str] = {}
    for part in parts:
        found, model = part.quantization, components.get(part.name)
        if found is None or not isinstance(model, nn.Module):
            continue
        if found.mixes_rows:
            setattr(model, MIXES_ROWS, f"{found.detail} scales activations by the whole batch")
        if found.is_online:
            num_layers = quantize(model, found, config.quantization_ignored_layers, device)
            if not num_layers:
                raise ModelError(
                    f"{part.name} ({type(model).__name__}) has no layer that {found.family} can be made of"
                )
            said[part.name] = f"{num_layers} layers"
    return said
