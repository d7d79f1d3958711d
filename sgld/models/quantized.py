"""Loads weights that lie apart from their component or are quantized, and quantizes what is not."""

import json
import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import BFLQuantizationConfig, GGUFQuantizationConfig
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from diffusers.loaders.single_file_model import FromOriginalModelMixin
from torch import nn

from sgld.config import QuantizationConfig
from sgld.errors import ModelError
from sgld.models.eight_bits import load_eight_bits, some
from sgld.models.linears import quantized
from sgld.models.quantization import MIXES_ROWS, OWN, Quantization
from sgld.models.weight_files import Weights, read_header


def load_weights(
    cls: Any, base: Mapping[str, Any], weights: Weights, found: Quantization | None, dtype: torch.dtype
) -> nn.Module:
    """A component of diffusers with these weights, on the CPU, or where its library puts it.

    :param base: the config of the component that the weights are for.
    :param dtype: in which it computes.
    :raises ModelError: the weights don't fit, or there is no way to load them.
    """
    config = {name: value for name, value in base.items() if name != "quantization_config"}
    if found is not None and found.family in OWN:
        model = load_eight_bits(cls, config, weights, found.activations, dtype)
    elif found is not None and found.family == "svdquant":
        model = _load_nunchaku(cls, weights, dtype)
    else:
        model = _load_with_diffusers(cls, config, weights, found, dtype)
    missing = [name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"]
    if missing:
        raise ModelError(f"{weights.name} doesn't fit {cls.__name__}: it has no {some(missing)}")
    return model.eval()


def _load_with_diffusers(
    cls: Any, config: dict[str, Any], weights: Weights, found: Quantization | None, dtype: torch.dtype
) -> nn.Module:
    """By diffusers' loaders, from a folder made for them: links to the weights, and the config."""
    of_file = {"gguf": GGUFQuantizationConfig, "nvfp4": BFLQuantizationConfig}.get(found.family if found else "")
    is_single = len(weights.files) == 1 and issubclass(cls, FromOriginalModelMixin)
    if of_file is not None and not is_single:
        raise ModelError(f"{weights.name}: diffusers reads such weights from one file, and not for {cls.__name__}")
    if found is not None and found.config is not None:
        # Where a checkpoint of 4 bits doesn't say in what it computes, bitsandbytes would take float32.
        dtypes = {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")} if "load_in_4bit" in found.config else {}
        config = config | {"quantization_config": dtypes | dict(found.config)}
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
