"""Reading LoRA adapters: from files of any trainer to two matrices for each layer of the model.

The formats are known to diffusers, whose converters are class methods of its pipelines that touch no model. What they
don't know is done here: scales (alpha) of all kinds are multiplied into the second matrix before.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sgld.errors import InvalidRequest
from sgld.models.lora_files import LoraFiles, find
from sgld.outcome import Raised, message_of, one_line, outcome_of

Tensors = dict[str, torch.Tensor]
DENOISERS = ("transformer", "unet")
SECOND = "transformer_2"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Parts of names that other kinds of adapters have, whose change isn't a product of two matrices.
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    ".lokr_": "LoKr",
    ".hada_": "LoHa",
    ".oft_": "OFT",
    ".lora_mid.": "LoCon with a third (Tucker) matrix",
    "lora_embedding_": "LoRA of embeddings",
}
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>A|B)\.(?P<what>weight|bias)")
_RAW_PART = re.compile(r"(?P<module>.+?)[._]lora(?:_linear_layer)?[._](?P<matrix>A|B|down|up)\.weight")
_UPS = ("B", "up")
# Converters list all names that they don't know.
_MAX_CHARS = 300
_OF_PEFT = "base_model.model."


@dataclass(frozen=True)
class Target:
    """A layer that an adapter can change: numbers of values that go in and out, of a convolution at each place."""

    num_in: int
    num_out: int


@dataclass(frozen=True)
class LoraLayer:
    """The change of one layer at scale 1: `up @ down @ x + bias`.

    `down` is (rank, in), `up` (out, rank), `bias` (out) or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: component name to module name to its change.

    `num_unmatched` layers of the file fit nothing in the model.
    """

    identity: str
    """Of its file."""
    alpha: float | None
    layers: dict[str, dict[str, LoraLayer]]
    num_unmatched: int = 0

    @property
    def id(self) -> str:
        return f"{self.identity}/{self.alpha}"

    @cached_property
    def size_bytes(self) -> int:
        layers = (layer for of_component in self.layers.values() for layer in of_component.values())
        return sum(part.nbytes for layer in layers for part in (layer.down, layer.up, layer.bias) if part is not None)

    def of(self, component: str, target: str) -> dict[str, LoraLayer]:
        """What it changes in a component, if `target` (all, or a component) says so.

        Of a model with two transformers, files name one: they are meant for both, or for the one that is the target.
        """
        if target not in ("all", component):
            return {}
        name = "transformer" if component == SECOND and SECOND not in self.layers else component
        return self.layers.get(name, {})


@dataclass(frozen=True)
class Adaptable:
    """What is known of a model to read its adapters: nothing of it changes when one is loaded."""

    pipeline_class: type
    targets: Mapping[str, Mapping[str, Target]]
    """Component name to module name to layer."""
    unet_config: Any = None
    """With it diffusers can number the blocks of SDXL as it does itself."""
    refuses_unmatched: bool = True

    @property
    def denoiser(self) -> str:
        return next((name for name in DENOISERS if name in self.targets), DENOISERS[0])


def adaptable(pipeline: Any, *, refuses_unmatched: bool = True) -> Adaptable:
    """What adapters can change in a pipeline."""
    components = {name: part for name, part in vars(pipeline).items() if isinstance(part, nn.Module)}
    names = [*getattr(pipeline, "_lora_loadable_modules", ()), SECOND]
    targets = {name: dict(_targets(components[name])) for name in names if name in components}
    config = getattr(components.get("unet"), "config", None)
    return Adaptable(type(pipeline), targets, config, refuses_unmatched)


def _targets(component: nn.Module) -> Iterable[tuple[str, Target]]:
    for name, module in component.named_modules():
        if isinstance(module, _CONVOLUTIONS):
            if module.groups == 1 and module.padding_mode == "zeros":
                yield name, Target(module.in_channels * math.prod(module.kernel_size), module.out_channels)
        # A layer that is quantized may be no nn.Linear. What belongs to nn.MultiheadAttention is never called.
        elif _is_linear(module) and type(module).__name__ != "NonDynamicallyQuantizableLinear":
            yield name, Target(int(module.in_features), int(module.out_features))


def _is_linear(module: Any) -> bool:
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return isinstance(module, nn.Module) and all(isinstance(size, int) for size in sizes)


def read(path: str, model: Adaptable, alpha: float | None = None) -> Adapter:
    """Read an adapter.

    :param alpha: where neither the file nor a config beside it says; by default the rank, which is a scale of 1.
    :raises InvalidRequest: it can't be found or read, is of another kind, or doesn't fit the model.
    """
    files = find(path)
    fitted = outcome_of(functools.partial(_fitted, files.weights, model))
    if isinstance(fitted, Raised):
        raise InvalidRequest(f"the LoRA adapter {path!r} can't be used: {_problem(fitted.error, model)}", "lora")
    raw, said, layers, unmatched = fitted.value
    has_alphas = any(name.endswith(".alpha") for name in raw)
    num_layers = sum(map(len, layers.values()))
    if not num_layers or (unmatched and model.refuses_unmatched):
        raise InvalidRequest(_mismatch(path, num_layers, unmatched, model), "lora")
    if not has_alphas:
        layers = _scaled(layers, _scale_of(files, said, model.denoiser, alpha))
    return Adapter(files.identity, alpha, layers, len(unmatched))


def _fitted(
    weights: Path, model: Adaptable
) -> tuple[Tensors, dict[str, Any], dict[str, dict[str, LoraLayer]], list[str]]:
    """What `_contents` and `_matched` have."""
    raw, said = _contents(weights)
    _check_kind(raw)
    return raw, said, *_matched(_converted(_prepared(raw, model), model), model)


def _problem(error: BaseException, model: Adaptable) -> str:
    if isinstance(error, InvalidRequest):
        return str(error)
    # Converters of diffusers raise anything at files that they don't know.
    said = f"{type(error).__name__}: {message_of(error, _MAX_CHARS)}"
    return f"{model.pipeline_class.__name__} can't read it: {said}"


def _contents(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a file, and what diffusers says of them in its header."""
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("lora_adapter_metadata")
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, json.loads(header) if header else {}
    except (OSError, SafetensorError, ValueError) as error:
        raise InvalidRequest(f"it isn't a safetensors file: {one_line(error)}") from None


def _check_kind(raw: Iterable[str]) -> None:
    for name in raw:
        for part, kind in _OTHER_KINDS.items():
            if part in name:
                raise InvalidRequest(f"it is {kind} ({name}); LoRA is supported")


def _prepared(raw: Tensors, model: Adaptable) -> Tensors:
    """The tensors with names that converters know, and alphas that are ranks, multiplied into the second matrices."""
    # Without the name that the adapter had in its trainer.
    named = {name.replace(".default.weight", ".weight"): tensor for name, tensor in raw.items()}
    bare = {name.removeprefix(_OF_PEFT): tensor for name, tensor in named.items()}
    modules = {match["module"] for name in bare if (match := _RAW_PART.fullmatch(name))}
    if modules & model.targets.get(model.denoiser, {}).keys():
        # Saved from the denoiser alone: its layers have no component in front.
        named = {f"{model.denoiser}.{name}": tensor for name, tensor in bare.items()}
    return _without_alphas(named)


def _without_alphas(tensors: Tensors) -> Tensors:
    found = dict(tensors)
    for name, tensor in tensors.items():
        match = _RAW_PART.fullmatch(name)
        alpha = tensors.get(f"{match['module']}.alpha") if match and match["matrix"] in _UPS else None
        if match is None or alpha is None:
            continue
        rank = tensor.shape[1]
        found[name] = tensor.float() * (float(alpha) / rank)
        # Some converters want one.
        found[f"{match['module']}.alpha"] = torch.tensor(float(rank))
    return found


def _converted(tensors: Tensors, model: Adaptable) -> Tensors:
    """The tensors under the names of the model's layers, with the component in front."""
    convert = getattr(model.pipeline_class, "lora_state_dict", None)
    if convert is None:
        raise InvalidRequest(f"{model.pipeline_class.__name__} takes no LoRA adapters")
    result = convert(tensors, return_alphas=True, unet_config=model.unet_config)
    converted: Tensors = result[0] if isinstance(result, tuple) else result
    return {_peft_name(name): tensor for name, tensor in converted.items() if not name.endswith(".alpha")}


def _peft_name(name: str) -> str:
    """The name in the newest of the forms that diffusers wrote."""
    from diffusers.utils import state_dict_utils as forms

    is_text = "text_encoder" in name.partition(".")[0]
    mapping = forms.DIFFUSERS_OLD_TO_PEFT | forms.DIFFUSERS_TO_PEFT if is_text else forms.UNET_TO_DIFFUSERS
    (renamed,) = forms.convert_state_dict({name: None}, mapping)
    return str(renamed)


def _matched(tensors: Tensors, model: Adaptable) -> tuple[dict[str, dict[str, LoraLayer]], list[str]]:
    """The layers by component and module, and the names of what fits nothing."""
    parts: dict[tuple[str, str], Tensors] = {}
    unmatched: list[str] = []
    for name, tensor in tensors.items():
        match = _PART.fullmatch(name)
        component, _, module = (match["module"] if match else name).partition(".")
        if match is None:
            unmatched.append(name)
        else:
            parts.setdefault((component, module), {})[f"{match['matrix']}.{match['what']}"] = tensor
    layers: dict[str, dict[str, LoraLayer]] = {}
    for (component, module), found in parts.items():
        targets = model.targets.get(component, {})
        # transformers has dropped a level that older files name.
        module = module if module in targets else module.removeprefix("text_model.")
        layer, problem = _layer(found, targets.get(module))
        if layer is not None:
            layers.setdefault(component, {})[module] = layer
        else:
            unmatched.append(f"{component}.{module}{problem}")
    return layers, unmatched


def _layer(parts: Tensors, target: Target | None) -> tuple[LoraLayer | None, str]:
    """One layer; or None, and why it doesn't fit."""
    if target is None:
        return None, ""
    if not {"A.weight", "B.weight"} <= parts.keys() <= {"A.weight", "B.weight", "B.bias"}:
        return None, f" (has only {', '.join(sorted(parts))})"
    down, up = parts["A.weight"].flatten(1), parts["B.weight"].flatten(1)
    if down.shape[1] != target.num_in or up.shape != (target.num_out, down.shape[0]):
        return None, f" ({tuple(up.shape)} by {tuple(down.shape)} in a layer of {target.num_out} by {target.num_in})"
    return LoraLayer(down, up, parts.get("B.bias")), ""


def _mismatch(path: str, num_layers: int, unmatched: list[str], model: Adaptable) -> str:
    shown = ", ".join(sorted(unmatched)[:3]) + (", ..." if len(unmatched) > 3 else "")
    name = model.pipeline_class.__name__
    said = f"the LoRA adapter {path!r} doesn't fit {name}: {len(unmatched)} of its layers match nothing ({shown})"
    return f"{said}, {num_layers} do" + ("; --lora-partial uses those" if num_layers else "; is it for another model?")


def _scaled(
    layers: dict[str, dict[str, LoraLayer]], scale_of: Callable[[str, str, int], float]
) -> dict[str, dict[str, LoraLayer]]:
    """The layers with scales that the file itself doesn't state."""

    def scaled(layer: LoraLayer, scale: float) -> LoraLayer:
        bias = layer.bias * scale if layer.bias is not None else None
        return layer if scale == 1 else LoraLayer(layer.down, layer.up.float() * scale, bias)

    return {
        component: {name: scaled(layer, scale_of(component, name, layer.rank)) for name, layer in found.items()}
        for component, found in layers.items()
    }


def _scale_of(
    files: LoraFiles, said: Mapping[str, Any], denoiser: str, alpha: float | None
) -> Callable[[str, str, int], float]:
    """Alpha over rank of a layer: by diffusers' header, by peft's config, or as the caller says."""

    def scale(component: str, module: str, rank: int) -> float:
        prefix = f"{component}."
        config = {n.removeprefix(prefix): value for n, value in said.items() if n.startswith(prefix)}
        if not config and files.config is not None and component == denoiser:
            config = files.config
        stated = config.get("lora_alpha", alpha if alpha is not None else rank)
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            # As peft reads its patterns.
            if re.match(rf"(.*\.)?({pattern})$", module):
                stated = value
                break
        return float(stated) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale
