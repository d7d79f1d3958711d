"""How the components of a model are run: flags, config keys and docs, as all of sgld.config."""

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from sgld.fields import FieldError, check_fields, option

Precision = Literal["fp32", "fp16", "bf16"]


class MemoryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What components weigh, and where they wait for their calls.

    :raises FieldError: two options exclude each other.
    """

    performance_mode: Annotated[
        Literal["auto", "speed", "memory", "manual"],
        option(
            "speed: compile denoisers at once; auto: large ones on a GPU, when that pays; memory: offload all that can"
            " be; manual: only what other options say",
            aliases=("mode",),
        ),
    ] = "auto"
    text_encoder_precision: Annotated[
        tuple[Precision, ...],
        option(
            "precision of the text encoders: one for all, or one for each in the model's order; an image encoder has"
            " the first. Default: as the denoiser",
            aliases=("text_encoder_precisions",),
        ),
    ] = ()
    text_encoder_cpu_offload: Annotated[bool, option("text encoders are on the GPU only while they are needed")] = False
    image_encoder_cpu_offload: Annotated[bool, option("the same for image encoders")] = False
    dit_cpu_offload: Annotated[bool, option("the same for denoisers")] = False
    vae_cpu_offload: Annotated[bool, option("the same for VAEs")] = False
    dit_layerwise_offload: Annotated[
        bool, option("of a denoiser only the layers that compute, and the next, are on the GPU")
    ] = False
    pin_cpu_memory: Annotated[
        bool, option("offloaded weights wait in pinned memory, from where they come several times faster")
    ] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dit_cpu_offload and self.dit_layerwise_offload:
            problem = "dit_cpu_offload is set, too; a denoiser is offloaded either as a whole or by layers"
            raise FieldError("dit_layerwise_offload", True, problem)

    def offloads(self, option: str) -> bool:
        """Whether an option for offloading is set, or follows from the mode."""
        follows = self.performance_mode == "memory" and option != "dit_cpu_offload"
        return bool(getattr(self, option)) or (follows and not (option[:4] == "dit_" and self.dit_cpu_offload))


class AttentionConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which kernel computes the attention of denoisers; `sgld.models.attention` knows the names."""

    attention_backend: Annotated[
        str | None,
        option("kernel of attention, by SGLang's name (fa, fa3, torch_sdpa, sage_attn, ...) or diffusers'"),
    ] = None
    diffusers_attention_backend: Annotated[
        str | None, option("the same: every model runs in diffusers (flash, _flash_3_hub, sage, xformers, native, ...)")
    ] = None
    attention_backend_config: Annotated[
        str | None,
        option("JSON, a path of JSON or YAML, or key=value,...: checks is true or false, masks is native or error"),
    ] = None


class CacheDitConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The cache-dit library; `sgld.models.cache_dit` knows its options and variables."""

    cache_dit_config: Annotated[
        str | None, option("options of cache-dit, for the diffusers backend: a path of YAML or JSON, or JSON itself")
    ] = None


class ConditioningConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much is kept of what encoders of text and pictures returned.

    :raises FieldError: a value is out of its range.
    """

    conditioning_cache_size: Annotated[
        float,
        Meta(ge=0, le=1e9),
        option(
            "MiB for what encoders returned, so that the same text isn't encoded again; 0 for none",
            aliases=("conditioning_cache_max_size_mb",),
        ),
    ] = 128.0
    disable_conditioning_cache: Annotated[bool, option("encode each text, whatever was encoded before")] = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def max_bytes(self) -> int:
        return 0 if self.disable_conditioning_cache else int(self.conditioning_cache_size * 2**20)


class GraphConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Forwards that are replayed as CUDA graphs.

    :raises FieldError: a value is out of its range.
    """

    graph_memory: Annotated[
        int, Meta(ge=0), option("MiB of the GPU for CUDA graphs of calls that come again and again; 0: no graphs")
    ] = 4096

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def max_bytes(self) -> int:
        return self.graph_memory * 2**20


class CalibrationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Forwards that a server measures before it says that it is ready.

    :raises FieldError: a size isn't one, or the limit is out of its range.
    """

    calibrate: Annotated[
        bool, option("sgld serve: measure forwards with synthetic requests first; later starts know the times")
    ] = False
    calibrate_sizes: Annotated[
        tuple[str, ...],
        option(
            "sizes for that, as 1024x1024; default: the model's own, and for pictures 512, 768, 1024 and 1536 squared"
        ),
    ] = ()
    calibrate_limit_s: Annotated[float, Meta(gt=0), option("no such request begins after so many seconds")] = 300.0

    def __post_init__(self) -> None:
        check_fields(self)
        for size in self.calibrate_sizes:
            if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}|default", size):
                raise FieldError("calibrate_sizes", size, "a size is WIDTHxHEIGHT, as 1024x1024, or default")
