"""How the engine, its processes and its outputs are set up: the one source for flags, config keys and docs.

A field is a flag (`--model-path`), a key of the config file (`model_path`) and a line of the docs. `aliases` in its
`Meta` names other spellings; `later` says what a field waits for: only its default is accepted until then.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sgld.encoding import DEFAULT_QUALITY, OutputQuality, VideoEncoding, quality_of
from sgld.fields import FieldError, check_fields, refuse_later
from sgld.parallel import ParallelConfig as ParallelConfig
from sgld.storage_config import StorageConfig

Precision = Literal["fp32", "fp16", "bf16"]
EMBEDDED_IMAGE_MODEL = "sgld/tiny-image"
EMBEDDED_VIDEO_MODEL = "sgld/tiny-video"


def _field(description: str, **extra: Any) -> Meta:
    return Meta(description=description, extra=extra or None)


class AttentionConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which kernel computes the attention of denoisers; `sgld.models.attention` knows the names."""

    attention_backend: Annotated[
        str | None,
        _field("kernel of attention, by SGLang's name (fa, fa3, torch_sdpa, sage_attn, ...) or diffusers'"),
    ] = None
    diffusers_attention_backend: Annotated[
        str | None, _field("the same: every model runs in diffusers (flash, _flash_3_hub, sage, xformers, native, ...)")
    ] = None
    attention_backend_config: Annotated[
        str | None,
        _field("JSON, a path of JSON or YAML, or key=value,...: checks is true or false, masks is native or error"),
    ] = None


class CacheDitConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The cache-dit library; `sgld.models.cache_dit` knows its options and variables."""

    cache_dit_config: Annotated[
        str | None, _field("options of cache-dit, for the diffusers backend: a path of YAML or JSON, or JSON itself")
    ] = None


class NoiseConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How noise is removed, where that isn't left to the model's author.

    :raises FieldError: a value is out of its range.
    """

    scheduler: Annotated[
        str | None,
        _field(
            "class of the noise scheduler, in the place of the model's own, of which it takes its values",
            aliases=("scheduler_class_override",),
        ),
    ] = None
    scheduler_config: Annotated[dict[str, Any], _field("values of the noise scheduler (JSON object)")] = {}
    flow_shift: (
        Annotated[float, Meta(gt=0), _field("shift of the noise schedule of flow matching; a request may choose, too")]
        | None
    ) = None
    boundary_ratio: (
        Annotated[
            float,
            Meta(ge=0, le=1),
            _field("where the second transformer takes over: from 1, the beginning of the schedule, to 0"),
        ]
        | None
    ) = None
    embedded_cfg_scale: (
        Annotated[float, Meta(ge=0), _field("guidance scale of guidance-distilled models, where a request has none")]
        | None
    ) = None

    def __post_init__(self) -> None:
        check_fields(self)


class ConditioningConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much is kept of what encoders of text and pictures returned.

    :raises FieldError: a value is out of its range.
    """

    conditioning_cache_size: Annotated[
        float,
        Meta(ge=0, le=1e9),
        _field(
            "MiB for what encoders returned, so that the same text isn't encoded again; 0 for none",
            aliases=("conditioning_cache_max_size_mb",),
        ),
    ] = 128.0
    disable_conditioning_cache: Annotated[bool, _field("encode each text, whatever was encoded before")] = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def max_bytes(self) -> int:
        return 0 if self.disable_conditioning_cache else int(self.conditioning_cache_size * 2**20)


class SourceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of a model's place is loaded, and as which pipeline."""

    model_subfolder: Annotated[str | None, _field("folder of the model inside of model_path")] = None
    variant: Annotated[
        str | None,
        _field("variant of the weights, a part of the names of their files, as fp16", aliases=("model_variant",)),
    ] = None
    single_file_config: Annotated[
        str | None,
        _field("folder or hub id of a model with the components of a model_path that is one .safetensors file"),
    ] = None
    pipeline_class_name: Annotated[
        str | None, _field("another pipeline class of diffusers for the same components", aliases=("pipeline",))
    ] = None
    custom_pipeline: Annotated[
        str | None,
        _field(
            "pipeline code from elsewhere: a folder with pipeline.py, a hub id, or a community pipeline of diffusers"
        ),
    ] = None


class QuantizationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights of eight bits and fewer: checkpoints that have them, and what is made of those that don't."""

    transformer_weights_path: Annotated[
        str | None,
        _field(
            "weights of the transformer from a file, folder, index, hub id or owner/repo:file; quantized or not",
            aliases=("transformer_quantized_path", "quantized_model_path"),
        ),
    ] = None
    transformer_2_weights_path: Annotated[str | None, _field("the same for the second transformer")] = None
    unet_weights_path: Annotated[str | None, _field("the same for the UNet")] = None
    quantization: Annotated[
        Literal[
            "none", "fp8", "fp8_dynamic", "int8", "int8_dynamic", "modelopt", "modelopt_fp8", "modelopt_fp4",
            "bitsandbytes", "torchao", "gguf", "svdquant",
        ],
        _field("quantize denoisers while they are loaded (fp8, int8; dynamic: activations, too), or what they must be"),
    ] = "none"  # fmt: skip
    quantization_ignored_layers: Annotated[
        tuple[str, ...], _field("parts of names of layers that aren't quantized while loading")
    ] = ()


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The LoRA adapters that are there from the start, and how many may be.

    :raises FieldError: a value is out of its range, or there are more nicknames or scales than paths.
    """

    lora_path: Annotated[
        tuple[str, ...], _field("LoRA adapters: files, folders or hub ids, where :name names a file of a folder")
    ] = ()
    lora_nickname: Annotated[
        tuple[str, ...], _field("one for each; default: `default`, and names of their files where there are several")
    ] = ()
    lora_scale: Annotated[tuple[float, ...], _field("one for each, or one for all; default: 1.0")] = ()
    lora_weight_name: Annotated[str | None, _field("the file, where lora_path is a folder or hub id")] = None
    lora_alpha: Annotated[float, Meta(gt=0), _field("alpha of adapters that don't say; default: their rank")] | None = (
        None
    )
    lora_target: Annotated[str, _field("the component that they change, as transformer_2")] = "all"
    lora_partial: Annotated[bool, _field("load adapters, too, of which some layers fit nothing in the model")] = False
    max_loras: Annotated[int, Meta(ge=1), _field("combinations of adapters on the device at the same time")] = 8
    max_lora_bytes: Annotated[
        int, Meta(ge=0), _field("memory for adapters that were read; those used last are kept")
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


class MemoryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What components weigh, and where they wait for their calls.

    :raises FieldError: two options exclude each other.
    """

    performance_mode: Annotated[
        Literal["auto", "speed", "memory", "manual"],
        _field(
            "speed: compile denoisers at once; auto: large ones on a GPU, when that pays; memory: offload all that can"
            " be; manual: only what other options say",
            aliases=("mode",),
        ),
    ] = "auto"
    text_encoder_precision: Annotated[
        tuple[Precision, ...],
        _field(
            "precision of the text encoders: one for all, or one for each in the model's order; an image encoder has"
            " the first. Default: as the denoiser",
            aliases=("text_encoder_precisions",),
        ),
    ] = ()
    text_encoder_cpu_offload: Annotated[bool, _field("text encoders are on the GPU only while they are needed")] = False
    image_encoder_cpu_offload: Annotated[bool, _field("the same for image encoders")] = False
    dit_cpu_offload: Annotated[bool, _field("the same for denoisers")] = False
    vae_cpu_offload: Annotated[bool, _field("the same for VAEs")] = False
    dit_layerwise_offload: Annotated[
        bool, _field("of a denoiser only the layers that compute, and the next, are on the GPU")
    ] = False
    pin_cpu_memory: Annotated[
        bool, _field("offloaded weights wait in pinned memory, from where they come several times faster")
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


class CalibrationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Forwards that a server measures before it says that it is ready.

    :raises FieldError: a size isn't one, or the limit is out of its range.
    """

    calibrate: Annotated[
        bool, _field("sgld serve: measure forwards with synthetic requests first; later starts know the times")
    ] = False
    calibrate_sizes: Annotated[
        tuple[str, ...],
        _field(
            "sizes for that, as 1024x1024; default: the model's own, and for pictures 512, 768, 1024 and 1536 squared"
        ),
    ] = ()
    calibrate_limit_s: Annotated[float, Meta(gt=0), _field("no such request begins after so many seconds")] = 300.0

    def __post_init__(self) -> None:
        check_fields(self)
        for size in self.calibrate_sizes:
            if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}|default", size):
                raise FieldError("calibrate_sizes", size, "a size is WIDTHxHEIGHT, as 1024x1024, or default")


class GraphConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Forwards that are replayed as CUDA graphs.

    :raises FieldError: a value is out of its range.
    """

    graph_memory: Annotated[
        int, Meta(ge=0), _field("MiB of the GPU for CUDA graphs of calls that come again and again; 0: no graphs")
    ] = 4096

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def max_bytes(self) -> int:
        return self.graph_memory * 2**20


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the engine loads and how it runs it.

    :raises FieldError: a value is out of its range, or its feature isn't there yet.
    """

    model_path: Annotated[
        str, _field("a folder, a Hugging Face model id, or a model that ships with sgld", aliases=("model",))
    ] = EMBEDDED_IMAGE_MODEL
    revision: Annotated[str | None, _field("revision of the model on the hub")] = None
    backend: Annotated[
        Literal["auto", "sglang", "sgld", "diffusers"],
        _field(
            "sglang (or sgld): the engine; diffusers: pipelines run whole, one at a time; auto: what suits the model"
        ),
    ] = "auto"
    component_paths: Annotated[
        dict[str, str],
        _field("components from other folders or hub ids; --vae-path PATH chooses the vae, and so on for each"),
    ] = {}
    trust_remote_code: Annotated[bool, _field("run code that comes with a model or its components")] = False
    device: Annotated[Literal["auto", "cpu", "cuda"], _field("where it runs; auto takes a GPU if there is one")] = (
        "auto"
    )
    dit_precision: Annotated[
        Precision | None, _field("precision of the denoiser: bf16 on a GPU, else fp32", aliases=("precision",))
    ] = None
    vae_precision: Annotated[Precision | None, _field("precision of the VAE. Default: as the denoiser")] = None
    vae_tiling: Annotated[bool, _field("decode in tiles, which needs less memory")] = False
    vae_slicing: Annotated[bool, _field("decode one sample at a time, which needs less memory")] = False
    num_cpu_threads: Annotated[int, Meta(ge=1), _field("CPU threads of a forward; default: all cores")] | None = None
    max_running_requests: Annotated[
        int, Meta(ge=1), _field("requests that are denoised at the same time, by each copy of the model")
    ] = 32
    max_queued_requests: Annotated[int, Meta(ge=1), _field("requests that may wait; more are refused")] = 1024
    max_batch_size: Annotated[int, Meta(ge=1), _field("calls that share a forward at most")] = 16
    merge: Annotated[bool, _field("let calls of several requests share a forward, where that is proved exact")] = True
    load_timeout_s: Annotated[float, Meta(gt=0), _field("longest silence of a rank while it loads")] = 600.0
    run_timeout_s: Annotated[float, Meta(gt=0), _field("deadline of a forward; 20 times its prediction if longer")] = (
        60.0
    )
    enable_torch_compile: Annotated[
        bool, _field("compile denoisers, in another process while requests go on; later starts use what was compiled")
    ] = False
    trace: Annotated[
        str | None, _field("write a trace of every tick and request to this file, for Perfetto or chrome://tracing")
    ] = None
    source: SourceConfig = SourceConfig()
    parallel: ParallelConfig = ParallelConfig()
    memory: MemoryConfig = MemoryConfig()
    attention: AttentionConfig = AttentionConfig()
    cache_dit: CacheDitConfig = CacheDitConfig()
    noise: NoiseConfig = NoiseConfig()
    conditioning: ConditioningConfig = ConditioningConfig()
    quantized: QuantizationConfig = QuantizationConfig()
    adapters: LoraConfig = LoraConfig()
    graphs: GraphConfig = GraphConfig()
    calibration: CalibrationConfig = CalibrationConfig()

    def __post_init__(self) -> None:
        check_fields(self)
        refuse_later(self)


class OutputConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which files are written and how.

    :raises FieldError: a value is out of its range.
    """

    output_path: Annotated[str, _field("folder of the outputs")] = "outputs"
    output_file_name: Annotated[
        str | None,
        _field(
            "file name; its ending chooses png, jpg, webp, avif, gif, mp4, wav or flac. Default: prompt, time and hash"
        ),
    ] = None
    save_output: Annotated[bool, _field("write files")] = True
    return_frames: Annotated[bool, _field("write each frame of a video as a PNG, too")] = False
    output_quality: Annotated[
        Annotated[int, Meta(ge=1, le=100)] | OutputQuality,
        _field("quality of JPEG, WebP, AVIF and MP4; also default, maximum, high, medium or low"),
    ] = DEFAULT_QUALITY
    output_compression: (
        Annotated[int, Meta(ge=0, le=100), _field("the same, from 0 to 100, where 100 is the best; it counts more")]
        | None
    ) = None
    metadata: Annotated[bool, _field("embed the parameters into the files")] = True
    video: VideoEncoding = VideoEncoding()
    storage: StorageConfig = StorageConfig()

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def encoding_quality(self) -> int:
        return quality_of(self.output_quality) if self.output_compression is None else max(1, self.output_compression)


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP server: where it listens, who may ask it, and for how much; `sgld generate` ignores these.

    :raises FieldError: a value is out of its range.
    """

    host: Annotated[str, _field("address of the HTTP server")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535), _field("port of the HTTP server; 0 takes a free one")] = 30000
    ssl_certfile: Annotated[str | None, _field("certificate (PEM); with it the server speaks HTTPS")] = None
    ssl_keyfile: Annotated[str | None, _field("private key of the certificate (PEM)")] = None
    served_model_name: Annotated[str | None, _field("name of the model in the HTTP API")] = None
    api_key: Annotated[
        tuple[str, ...], _field("keys that clients must have one of; each sees its own requests only")
    ] = ()
    api_key_file: Annotated[str | None, _field("file with one such key per line")] = None
    allowed_hosts: Annotated[
        tuple[str, ...], _field("names under which a server on a loopback address is asked, beside localhost")
    ] = ()
    cors_origins: Annotated[tuple[str, ...], _field("origins whose pages may use the API; * for all")] = ()
    allow_path: Annotated[tuple[str, ...], _field("folders whose files requests may name; by default none")] = ()
    allow_private_urls: Annotated[bool, _field("fetch pictures from private addresses, too")] = False
    allow_lora_download: Annotated[bool, _field("let clients name LoRA adapters on the hub")] = False
    allow_filter_download: Annotated[
        bool, _field("let clients name weights of interpolation and upscaling on the hub")
    ] = False
    data_dir: Annotated[
        str | None, _field("folder of jobs and results, for one server at a time; default: $XDG_DATA_HOME/sgld")
    ] = None
    result_ttl_s: Annotated[
        float, Meta(gt=0), _field("how long results are kept, in seconds", aliases=("result_ttl",))
    ] = 30 * 86400.0
    result_max_bytes: (
        Annotated[int, Meta(ge=0), _field("how much is kept of results; the oldest go first. Default: no limit")] | None
    ) = None
    max_pixels: Annotated[int, Meta(ge=1), _field("pixels of a picture or frame at most")] = 4096 * 4096
    max_frames: Annotated[int, Meta(ge=1), _field("frames of a video at most")] = 512
    max_steps: Annotated[int, Meta(ge=1), _field("denoising steps of a request at most")] = 200
    max_outputs: Annotated[int, Meta(ge=1, le=64), _field("outputs of a request at most")] = 10
    max_prompt_chars: Annotated[int, Meta(ge=1), _field("characters of a prompt at most")] = 32_000
    max_body_bytes: Annotated[int, Meta(ge=1), _field("size of a request with its uploads at most")] = 64 * 1024 * 1024
    heartbeat_s: Annotated[float, Meta(gt=0), _field("silence after which an event stream gets a sign of life")] = 15.0
    shutdown_timeout_s: Annotated[float, Meta(ge=0), _field("how long running requests may go on at the end")] = 30.0
    log_level: Annotated[Literal["debug", "info", "warning", "error"], _field("log level of the HTTP server")] = "info"
    log_format: Annotated[Literal["text", "json"], _field("form of the log; json has request ids")] = "text"
    log_requests: Annotated[bool, _field("log each HTTP request")] = False
    storage: StorageConfig = StorageConfig()

    def __post_init__(self) -> None:
        check_fields(self)


def data_root() -> Path:
    """Where results are kept unless the operator says where: ~/.local/share/sgld."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "sgld"


def cache_root() -> Path:
    """Where sgld keeps what it learns: $SGLANG_DIFFUSION_CACHE_ROOT, by default ~/.cache/sgl_diffusion."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sgl_diffusion"
    return Path(os.environ.get("SGLANG_DIFFUSION_CACHE_ROOT") or default)
