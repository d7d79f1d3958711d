"""How weights are quantized, found in what their files say of themselves.

Looked at in this order: what the config of sgld says; `quantization_config` of config.json; the metadata of safetensors
files; the kinds of their tensors. Nothing is loaded for that.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from sgld.errors import ModelError
from sgld.models.weight_files import Header, Weights

Family = Literal[
    "fp8", "int8", "nvfp4", "gguf", "torchao", "bitsandbytes", "modelopt", "quanto", "auto-round", "sdnq", "bfl",
    "nunchaku_lite", "svdquant",
]  # fmt: skip
Activations = Literal["full", "rows", "static"]
MIXES_ROWS = "sgld_mixes_rows"
"""An attribute of components whose calls must not share a forward: it says why."""
# What `quantization` of the config asks for.
_ONLINE: dict[str, tuple[Family, Activations]] = {
    "fp8": ("fp8", "full"),
    "fp8_dynamic": ("fp8", "rows"),
    "int8": ("int8", "full"),
    "int8_dynamic": ("int8", "rows"),
}
_DECLARED: dict[str, tuple[Family, ...]] = {
    "modelopt": ("fp8", "nvfp4", "modelopt"),
    "modelopt_fp8": ("fp8",),
    "modelopt_fp4": ("nvfp4",),
    "bitsandbytes": ("bitsandbytes",),
    "torchao": ("torchao",),
    "gguf": ("gguf",),
    "svdquant": ("svdquant", "nunchaku_lite"),
}
# Loaded by sgld itself; all others by diffusers or by the library that they need.
OWN: tuple[Family, ...] = ("fp8", "int8")
# No loader of folders reads these: their files are loaded by themselves.
BY_FILES: tuple[Family, ...] = (*OWN, "nvfp4", "gguf", "svdquant")


@dataclass(frozen=True)
class Quantization:
    """How the weights of a component are quantized.

    :ivar detail: what kind of its family it is, for people.
    :ivar found_in: what said so.
    :ivar activations: in full precision, or in eight bits with scales of rows or of the checkpoint.
    :ivar config: `quantization_config` as diffusers takes it.
    :ivar mixes_rows: a row's result depends on the others of its batch.
    """

    family: Family
    bits: int
    detail: str
    found_in: str
    activations: Activations = "full"
    config: Mapping[str, Any] | None = None
    mixes_rows: bool = False
    is_online: bool = False
    """Made while loading, of weights that aren't quantized."""
    was_asked_for: bool = False
    """How activations go in is as the config of sgld says, not the checkpoint."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What is decided, for people."""
        said = {"full": (), "rows": ("activations in 8 bits, by rows",), "static": ("activations in 8 bits, scaled",)}
        kind = f"{self.family} {self.detail}, {self.bits} bits (by {self.found_in})"
        alone = "its calls share no forward: activations are scaled by the whole batch"
        return (kind, *said[self.activations], *([alone] if self.mixes_rows else []))


def agreed(asked: str, found: Quantization | None, name: str) -> Quantization | None:
    """What the config asks for and what a component of that name is, as one.

    :raises ModelError: they contradict each other.
    """
    if asked == "none":
        return found
    if found is None:
        if asked not in _ONLINE and name.endswith("_2"):
            # Checkpoints often have a first transformer only.
            return None
        if asked not in _ONLINE:
            raise ModelError(f"quantization is {asked!r}, but the weights of {name} aren't quantized at all")
        family, activations = _ONLINE[asked]
        return Quantization(
            family, 8, "with scales of rows", "the quantization option", activations, is_online=True, was_asked_for=True
        )
    families = (_ONLINE[asked][0],) if asked in _ONLINE else _DECLARED[asked]
    if found.family not in families:
        raise ModelError(
            f"quantization is {asked!r}, but the weights of {name} are {found.family} (by {found.found_in})"
        )
    is_dynamic = asked in _ONLINE and _ONLINE[asked][1] == "rows"
    return replace(found, activations="rows", was_asked_for=True) if is_dynamic else found


def detect(weights: Weights | None, config: Mapping[str, Any] | None) -> Quantization | None:
    """How weights are quantized; None if they aren't.

    :param weights: the files; None where only the config is known.
    :param config: config.json of the component.
    :raises ModelError: in a way that nobody here can load.
    """
    if weights is not None and weights.is_gguf:
        return _of_gguf(weights.files[0].name)
    if declared := (config or {}).get("quantization_config"):
        return _refined(_of_config(declared, "config.json"), weights)
    if weights is None:
        return None
    header = weights.header()
    for key in ("_quantization_metadata", "quantization_config"):
        if declared := _parsed(header.metadata.get(key)):
            return _refined(_of_metadata(declared, key), weights)
    return _of_tensors(header, weights.files[0].name)


def _parsed(text: str | None) -> dict[str, Any]:
    try:
        return dict(json.loads(text or "{}"))
    except (ValueError, TypeError):
        return {}


def _of_gguf(file_name: str) -> Quantization:
    match = re.search(r"(?i)(?:IQ|TQ|Q)(\d)(?:_\w+?)?(?=[.-]|$)|BF16|F16|F32", file_name)
    bits = int(match[1]) if match and match[1] else 16 if match else 8
    return Quantization("gguf", bits, match[0].upper() if match else "of some types", "file")


def _of_config(declared: Mapping[str, Any], found_in: str) -> Quantization:
    """By a quantization_config."""
    method = str(declared.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in declared else ""))
    config = dict(declared)
    match method:
        case "bitsandbytes":
            is_4bit = bool(declared.get("load_in_4bit"))
            detail = str(declared.get("bnb_4bit_quant_type", "fp4")) if is_4bit else "LLM.int8"
            # Columns with outliers are looked for in all rows together.
            mixes = not is_4bit and bool(declared.get("llm_int8_threshold", 6.0))
            return Quantization("bitsandbytes", 4 if is_4bit else 8, detail, found_in, config=config, mixes_rows=mixes)
        case "torchao":
            kind = json.dumps(declared.get("quant_type", {}))
            default = dict(declared.get("quant_type") or {}).get("default") or {}
            detail = str(default.get("_type", "of some kind"))
            digits = re.search(r"(\d)(?:WeightOnly|Weight)", detail)
            # One scale for all activations of a batch is the default of torchao's dynamic FP8.
            is_dynamic = "Float8DynamicActivation" in detail
            mixes = "PerTensor" in kind or (is_dynamic and "PerRow" not in kind)
            return Quantization(
                "torchao", int(digits[1]) if digits else 8, detail, found_in, config=config, mixes_rows=mixes
            )
        case "modelopt" if "quant_algo" in declared:
            return _of_modelopt(str(declared["quant_algo"]), found_in)
        case "modelopt":
            detail = str(declared.get("quant_type", "FP8"))
            return Quantization("modelopt", 4 if "4" in detail.split("_")[0] else 8, detail, found_in, config=config)
        case "fp8":
            if declared.get("weight_block_size"):
                raise ModelError("FP8 with scales of blocks (weight_block_size) can't be loaded; scales of rows can")
            # A scale that the whole batch shares isn't known before the batch is: rows have their own instead.
            scheme: Activations = "static" if declared.get("activation_scheme") == "static" else "rows"
            return Quantization("fp8", 8, "", found_in, scheme)
        case "quanto" | "auto-round" | "sdnq" | "nunchaku_lite" | "bfl":
            bits = re.search(r"\d", str(declared.get("weights_dtype") or declared.get("bits") or "4"))
            return Quantization(method, int(bits[0]) if bits else 8, "by diffusers", found_in, config=config)
    known = "bitsandbytes, torchao, modelopt, fp8, quanto, auto-round, sdnq, nunchaku_lite, bfl"
    raise ModelError(f"quantization_config has the quant_method {method!r}; known are {known}")


def _of_modelopt(algo: str, found_in: str) -> Quantization:
    """What NVIDIA's Model Optimizer exports."""
    if algo == "FP8":
        return Quantization("fp8", 8, "of ModelOpt", found_in, "static")
    if algo == "NVFP4":
        return Quantization("nvfp4", 4, "of ModelOpt", found_in)
    raise ModelError(f"quantization_config has the quant_algo {algo!r} of ModelOpt; FP8 and NVFP4 can be loaded")


_LAYER_FORMATS = {"float8_e4m3fn": "fp8", "float8_e5m2": "fp8", "int8_tensorwise": "int8", "nvfp4": "nvfp4"}


def _of_metadata(declared: Mapping[str, Any], key: str) -> Quantization:
    """By the metadata of safetensors: a quantization_config, or the formats of layers as ComfyUI writes them."""
    layers = declared.get("layers")
    if not isinstance(layers, dict):
        return _of_config(declared, f"metadata {key}")
    return of_layers((layer or {}).get("format", "") for layer in layers.values())


def of_layers(formats: Any) -> Quantization:
    """By the formats of layers.

    :raises ModelError: one of these can't be loaded, or there are several.
    """
    named = sorted(set(formats))
    families = {_LAYER_FORMATS.get(name) for name in named}
    match families:
        case _ if families == {"fp8"}:
            return Quantization("fp8", 8, "", "metadata")
        case _ if families == {"int8"}:
            return Quantization("int8", 8, "", "metadata")
        case _ if families == {"nvfp4"}:
            return Quantization("nvfp4", 4, "", "metadata")
    raise ModelError(
        f"layers are quantized as {', '.join(named)}; of one kind of {', '.join(_LAYER_FORMATS)} they can be loaded"
    )


def _of_tensors(header: Header, file_name: str) -> Quantization | None:
    """By the kinds of tensors, and what the file is called."""
    tensors, found_in = header.tensors, "tensors"
    scales = {name for name in tensors if is_weight_scale(name)}
    if any(tensors[name].dtype == "F8_E4M3" for name in scales):
        return Quantization("nvfp4", 4, "", found_in)
    if svdq := re.search(r"svdq-(int4|fp4)_r(\d+)", file_name):
        return Quantization("svdquant", 4, f"{svdq[1]}, rank {svdq[2]}", "file name")
    if any(name.endswith((".wscales", ".lora_down", ".proj_down")) for name in tensors) and any(
        name.endswith(".qweight") for name in tensors
    ):
        return Quantization("svdquant", 4, "of unknown rank", found_in)
    for kind in ("nf4", "fp4"):
        if any(name.endswith(f".quant_state.bitsandbytes__{kind}") for name in tensors):
            config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
            return Quantization("bitsandbytes", 4, kind, found_in, config=config)
    if any(name.endswith(".SCB") for name in tensors):
        config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        return Quantization("bitsandbytes", 8, "LLM.int8", found_in, config=config, mixes_rows=True)
    if "tensor_names" in header.metadata:
        raise ModelError(f"{file_name} is quantized with torchao; name its folder, whose config.json says how")
    if any(info.dtype.startswith("F8_E") for info in tensors.values()):
        return _with_detail(Quantization("fp8", 8, "", found_in), header)
    if scales and any(info.dtype == "I8" for info in tensors.values()):
        return _with_detail(Quantization("int8", 8, "", found_in), header)
    return None


def is_weight_scale(name: str) -> bool:
    """Whether a tensor of that name is the scale of a layer's weight."""
    return name.endswith((".weight_scale", ".scale_weight"))


def is_input_scale(name: str) -> bool:
    """Whether a tensor of that name is the scale of a layer's activations."""
    return name.endswith((".input_scale", ".scale_input"))


def _refined(found: Quantization, weights: Weights | None) -> Quantization:
    """With what the tensors add, where sgld loads them itself."""
    return found if weights is None or found.family not in OWN else _with_detail(found, weights.header())


def _with_detail(found: Quantization, header: Header) -> Quantization:
    tensors = header.tensors
    shapes = [info.shape for name, info in tensors.items() if is_weight_scale(name)]
    if any(name.endswith(".weight_scale_inv") for name in tensors) or any(len(s) == 2 and s[1] > 1 for s in shapes):
        raise ModelError(f"{found.family} with scales of blocks can't be loaded; scales of rows or of tensors can")
    # A layer of one output has one scale, too; so all are looked at.
    are_rows = any(shape and shape[0] > 1 for shape in shapes)
    kind = "with scales of rows" if are_rows else "with scales of tensors" if shapes else "without scales"
    # SGLang multiplies in 8 bits wherever the checkpoint brings scales for that.
    has_static = found.family == "fp8" and any(is_input_scale(name) for name in tensors)
    activations = "static" if has_static else "full" if found.activations == "static" else found.activations
    return replace(found, detail=f"{found.detail} {kind}".strip(), activations=activations)
