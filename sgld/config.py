"""How the engine, its processes and its outputs are set up: the one source for flags, config keys and docs.

A field is a flag (`--model-path`), a key of the config file (`model_path`) and a line of the docs.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from sgld.encoding import DEFAULT_QUALITY, OutputQuality, VideoEncoding, quality_of
from sgld.execution_config import (
    AttentionConfig as AttentionConfig,
)
from sgld.execution_config import (
    CacheDitConfig as CacheDitConfig,
)
from sgld.execution_config import (
    CalibrationConfig as CalibrationConfig,
)
from sgld.execution_config import (
    ConditioningConfig as ConditioningConfig,
)
from sgld.execution_config import (
    GraphConfig as GraphConfig,
)
from sgld.execution_config import (
    MemoryConfig as MemoryConfig,
)
from sgld.execution_config import (
    Precision as Precision,
)
from sgld.fields import check_fields, option
from sgld.model_config import (
    LoraConfig as LoraConfig,
)
from sgld.model_config import (
    NoiseConfig as NoiseConfig,
)
from sgld.model_config import (
    QuantizationConfig as QuantizationConfig,
)
from sgld.model_config import (
    SourceConfig as SourceConfig,
)
from sgld.parallel import ParallelConfig as ParallelConfig
from sgld.storage_config import StorageConfig

EMBEDDED_IMAGE_MODEL = "sgld/tiny-image"
EMBEDDED_VIDEO_MODEL = "sgld/tiny-video"


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the engine loads and how it runs it.

    :raises FieldError: a value is out of its range.
    """

    model_path: Annotated[
        str, option("a folder, a Hugging Face model id, or a model that ships with sgld", aliases=("model",))
    ] = EMBEDDED_IMAGE_MODEL
    revision: Annotated[str | None, option("revision of the model on the hub")] = None
    backend: Annotated[
        Literal["auto", "sglang", "sgld", "diffusers"],
        option(
            "sglang (or sgld): the engine; diffusers: pipelines run whole, one at a time; auto: what suits the model"
        ),
    ] = "auto"
    component_paths: Annotated[
        dict[str, str],
        option("components from other folders or hub ids; --vae-path PATH chooses the vae, and so on for each"),
    ] = {}
    trust_remote_code: Annotated[bool, option("run code that comes with a model or its components")] = False
    device: Annotated[Literal["auto", "cpu", "cuda"], option("where it runs; auto takes a GPU if there is one")] = (
        "auto"
    )
    dit_precision: Annotated[
        Precision | None, option("precision of the denoiser: bf16 on a GPU, else fp32", aliases=("precision",))
    ] = None
    vae_precision: Annotated[Precision | None, option("precision of the VAE. Default: as the denoiser")] = None
    vae_tiling: Annotated[bool, option("decode in tiles, which needs less memory")] = False
    vae_slicing: Annotated[bool, option("decode one sample at a time, which needs less memory")] = False
    num_cpu_threads: Annotated[int, Meta(ge=1), option("CPU threads of a forward; default: all cores")] | None = None
    max_running_requests: Annotated[
        int, Meta(ge=1), option("requests that are denoised at the same time, by each copy of the model")
    ] = 32
    max_queued_requests: Annotated[int, Meta(ge=1), option("requests that may wait; more are refused")] = 1024
    max_batch_size: Annotated[int, Meta(ge=1), option("calls that share a forward at most")] = 16
    merge: Annotated[bool, option("let calls of several requests share a forward, where that is proved exact")] = True
    load_timeout_s: Annotated[float, Meta(gt=0), option("longest silence of a rank while it loads")] = 600.0
    run_timeout_s: Annotated[float, Meta(gt=0), option("deadline of a forward; 20 times its prediction if longer")] = (
        60.0
    )
    enable_torch_compile: Annotated[
        bool, option("compile denoisers, in another process while requests go on; later starts use what was compiled")
    ] = False
    trace: Annotated[
        str | None, option("write a trace of every tick and request to this file, for Perfetto or chrome://tracing")
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


class OutputConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which files are written and how.

    :raises FieldError: a value is out of its range.
    """

    output_path: Annotated[str, option("folder of the outputs")] = "outputs"
    output_file_name: Annotated[
        str | None,
        option(
            "file name; its ending chooses png, jpg, webp, avif, gif, mp4, wav or flac. Default: prompt, time and hash"
        ),
    ] = None
    save_output: Annotated[bool, option("write files")] = True
    return_frames: Annotated[bool, option("write each frame of a video as a PNG, too")] = False
    output_quality: Annotated[
        Annotated[int, Meta(ge=1, le=100)] | OutputQuality,
        option("quality of JPEG, WebP, AVIF and MP4; also default, maximum, high, medium or low"),
    ] = DEFAULT_QUALITY
    output_compression: (
        Annotated[int, Meta(ge=0, le=100), option("the same, from 0 to 100, where 100 is the best; it counts more")]
        | None
    ) = None
    metadata: Annotated[bool, option("embed the parameters into the files")] = True
    video: VideoEncoding = VideoEncoding()
    storage: StorageConfig = StorageConfig()

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def encoding_quality(self) -> int:
        return quality_of(self.output_quality, self.output_compression)


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP server: where it listens, who may ask it, and for how much; `sgld generate` ignores these.

    :raises FieldError: a value is out of its range.
    """

    host: Annotated[str, option("address of the HTTP server")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535), option("port of the HTTP server; 0 takes a free one")] = 30000
    ssl_certfile: Annotated[str | None, option("certificate (PEM); with it the server speaks HTTPS")] = None
    ssl_keyfile: Annotated[str | None, option("private key of the certificate (PEM)")] = None
    served_model_name: Annotated[str | None, option("name of the model in the HTTP API")] = None
    api_key: Annotated[
        tuple[str, ...], option("keys that clients must have one of; each sees its own requests only")
    ] = ()
    api_key_file: Annotated[str | None, option("file with one such key per line")] = None
    allowed_hosts: Annotated[
        tuple[str, ...], option("names under which a server on a loopback address is asked, beside localhost")
    ] = ()
    cors_origins: Annotated[tuple[str, ...], option("origins whose pages may use the API; * for all")] = ()
    allow_path: Annotated[tuple[str, ...], option("folders whose files requests may name; by default none")] = ()
    allow_private_urls: Annotated[bool, option("fetch pictures from private addresses, too")] = False
    allow_lora_download: Annotated[bool, option("let clients name LoRA adapters on the hub")] = False
    allow_filter_download: Annotated[
        bool, option("let clients name weights of interpolation and upscaling on the hub")
    ] = False
    data_dir: Annotated[
        str | None, option("folder of jobs and results, for one server at a time; default: $XDG_DATA_HOME/sgld")
    ] = None
    result_ttl_s: Annotated[
        float, Meta(gt=0), option("how long results are kept, in seconds", aliases=("result_ttl",))
    ] = 30 * 86400.0
    result_max_bytes: (
        Annotated[int, Meta(ge=0), option("how much is kept of results; the oldest go first. Default: no limit")] | None
    ) = None
    max_pixels: Annotated[int, Meta(ge=1), option("pixels of a picture or frame at most")] = 4096 * 4096
    max_frames: Annotated[int, Meta(ge=1), option("frames of a video at most")] = 512
    max_steps: Annotated[int, Meta(ge=1), option("denoising steps of a request at most")] = 200
    max_outputs: Annotated[int, Meta(ge=1, le=64), option("outputs of a request at most")] = 10
    max_prompt_chars: Annotated[int, Meta(ge=1), option("characters of a prompt at most")] = 32_000
    max_body_bytes: Annotated[int, Meta(ge=1), option("size of a request with its uploads at most")] = 64 * 1024 * 1024
    heartbeat_s: Annotated[float, Meta(gt=0), option("silence after which an event stream gets a sign of life")] = 15.0
    shutdown_timeout_s: Annotated[float, Meta(ge=0), option("how long running requests may go on at the end")] = 30.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], option("log level of the server and its ranks")
    ] = "info"
    log_format: Annotated[Literal["text", "json"], option("form of the log; json has request ids")] = "text"
    log_requests: Annotated[bool, option("log each HTTP request")] = False
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
