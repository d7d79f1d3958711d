"""Which model is loaded, of which parts and in what form: flags, config keys and docs, as all of sgld.config."""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sgld.fields import FieldError, check_fields, option


class SourceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of a model's place is loaded, and as which pipeline."""

    model_subfolder: Annotated[str | None, option("folder of the model inside of model_path")] = None
    variant: Annotated[
        str | None,
        option("variant of the weights, a part of the names of their files, as fp16", aliases=("model_variant",)),
    ] = None
    single_file_config: Annotated[
        str | None,
        option("folder or hub id of a model with the components of a model_path that is one .safetensors file"),
    ] = None
    pipeline_class_name: Annotated[
        str | None, option("another pipeline class of diffusers for the same components", aliases=("pipeline",))
    ] = None
    custom_pipeline: Annotated[
        str | None,
        option(
            "pipeline code from elsewhere: a folder with pipeline.py, a hub id, or a community pipeline of diffusers"
        ),
    ] = None


class QuantizationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights of eight bits and fewer: checkpoints that have them, and what is made of those that don't."""

    transformer_weights_path: Annotated[
        str | None,
        option(
            "weights of the transformer from a file, folder, index, hub id or owner/repo:file; quantized or not",
            aliases=("transformer_quantized_path", "quantized_model_path"),
        ),
    ] = None
    transformer_2_weights_path: Annotated[str | None, option("the same for the second transformer")] = None
    unet_weights_path: Annotated[str | None, option("the same for the UNet")] = None
    quantization: Annotated[
        Literal[
            "none", "fp8", "fp8_dynamic", "int8", "int8_dynamic", "modelopt", "modelopt_fp8", "modelopt_fp4",
            "bitsandbytes", "torchao", "gguf", "svdquant",
        ],
        option("quantize denoisers while they are loaded (fp8, int8; dynamic: activations, too), or what they must be"),
    ] = "none"  # fmt: skip
    quantization_ignored_layers: Annotated[
        tuple[str, ...], option("parts of names of layers that aren't quantized while loading")
    ] = ()


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The LoRA adapters that are there from the start, and how many may be.

    :raises FieldError: a value is out of its range, or there are more nicknames or scales than paths.
    """

    lora_path: Annotated[
        tuple[str, ...], option("LoRA adapters: files, folders or hub ids, where :name names a file of a folder")
    ] = ()
    lora_nickname: Annotated[
        tuple[str, ...], option("one for each; default: `default`, and names of their files where there are several")
    ] = ()
    lora_scale: Annotated[tuple[float, ...], option("one for each, or one for all; default: 1.0")] = ()
    lora_weight_name: Annotated[str | None, option("the file, where lora_path is a folder or hub id")] = None
    lora_alpha: Annotated[float, Meta(gt=0), option("alpha of adapters that don't say; default: their rank")] | None = (
        None
    )
    lora_target: Annotated[str, option("the component that they change, as transformer_2")] = "all"
    lora_partial: Annotated[bool, option("load adapters, too, of which some layers fit nothing in the model")] = False
    max_loras: Annotated[int, Meta(ge=1), option("combinations of adapters on the device at the same time")] = 8
    max_lora_bytes: Annotated[
        int, Meta(ge=0), option("memory for adapters that were read; those used last are kept")
    ] = 4 * 1024**3

    def __post_init__(self) -> None:
        check_fields(self)
        num = len(self.lora_path)
        if len(self.lora_nickname) not in (0, num):
            raise FieldError("lora_nickname", self.lora_nickname, f"there are {num} in lora_path, one for each")
        if len(self.lora_scale) not in (0, 1, num):
            raise FieldError("lora_scale", self.lora_scale, f"there are {num} in lora_path, one for each")
        if len(set(self.nicknames)) < num:
            raise FieldError("lora_nickname", self.nicknames, "each needs one of its own; give lora_nickname")

    @property
    def notes(self) -> tuple[str, ...]:
        """What is loaded, one phrase each."""
        parts = zip(self.nicknames, self.paths, self.scales, strict=True)
        return tuple(f"LoRA adapter {nickname} from {path}, scale {scale:g}" for nickname, path, scale in parts)

    @property
    def nicknames(self) -> tuple[str, ...]:
        """Those that were given, or names made of the paths."""
        if self.lora_nickname or len(self.lora_path) == 1:
            return self.lora_nickname or ("default",)
        return tuple(Path(path.rpartition(":")[2]).stem for path in self.lora_path)

    @property
    def scales(self) -> tuple[float, ...]:
        """One for each path."""
        return (self.lora_scale or (1.0,)) * (1 if len(self.lora_scale) > 1 else len(self.lora_path))

    @property
    def paths(self) -> tuple[str, ...]:
        """With the name of the file."""
        return tuple(f"{path}:{self.lora_weight_name}" if self.lora_weight_name else path for path in self.lora_path)


class NoiseConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How noise is removed, where that isn't left to the model's author.

    :raises FieldError: a value is out of its range.
    """

    scheduler: Annotated[
        str | None,
        option(
            "class of the noise scheduler, in the place of the model's own, of which it takes its values",
            aliases=("scheduler_class_override",),
        ),
    ] = None
    scheduler_config: Annotated[dict[str, Any], option("values of the noise scheduler (JSON object)")] = {}
    flow_shift: (
        Annotated[float, Meta(gt=0), option("shift of the noise schedule of flow matching; a request may choose, too")]
        | None
    ) = None
    boundary_ratio: (
        Annotated[
            float,
            Meta(ge=0, le=1),
            option("where the second transformer takes over: from 1, the beginning of the schedule, to 0"),
        ]
        | None
    ) = None
    embedded_cfg_scale: (
        Annotated[float, Meta(ge=0), option("guidance scale of guidance-distilled models, where a request has none")]
        | None
    ) = None

    def __post_init__(self) -> None:
        check_fields(self)
