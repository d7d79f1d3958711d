"""What a client may choose for one request."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta

from sgld.errors import InvalidRequest
from sgld.fields import FieldError, check_fields

DEFAULT_SEED = 42
MAX_SEED = 2**63 - 1
MAX_NUMBER = 3.4028234663852886e38
"""The largest of float32: tensors take no larger ones."""
MAX_LORAS = 16
DEFAULT_FPS = 24.0
"""Where neither the client nor the model says; as in SGLang Diffusion."""
LANCZOS = "lanczos"
"""In the place of a path: enlarges without weights."""
OPTICAL_FLOW = "optical-flow"
"""In the place of a path: interpolates without weights."""
RIFE_REPO = "elfgum/RIFE-4.22.lite"
UPSCALING_REPO = "ai-forever/Real-ESRGAN"
"""On the hub: what is meant where no path is given, as in SGLang Diffusion."""


class LoraChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One LoRA adapter of a request: one that was loaded under a nickname, or one at a path.

    The path is a file, a folder, or an id on the hub, where `:name` names a file. `target` is the component that it
    changes. `alpha` counts where the adapter doesn't say. Who chose a nickname finds the path beside it later.
    """

    nickname: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    path: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None
    scale: Annotated[float, Meta(ge=-100, le=100)] = 1.0
    target: Annotated[str, Meta(max_length=100)] = "all"
    alpha: Annotated[float, Meta(gt=0)] | None = None

    def __str__(self) -> str:
        return repr(self.nickname or self.path)


def lora_choice(text: str) -> Any:
    """What stands for an adapter on a command line: JSON, or a nickname or path, with `=scale` behind it.

    :raises msgspec.DecodeError: it looks like JSON and isn't.
    """
    if text.startswith(("{", "[")):
        return msgspec.json.decode(text)
    name, _, scale = text.rpartition("=")
    try:
        number = float(scale)
    except ValueError:
        name, number = text, 1.0
    name = name or text
    return {"path" if "/" in name or name.endswith(".safetensors") else "nickname": name, "scale": number}


class TaylorCache(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="method", tag="taylor"
):
    """Outputs of the denoiser are computed at every `interval`-th step, and extrapolated in between.

    :raises FieldError: a value is out of its range.
    """

    interval: Annotated[int, Meta(ge=2, le=64, description="one step in so many is computed")] = 3
    order: Annotated[int, Meta(ge=0, le=3, description="order of the extrapolation; 0 repeats the last output")] = 0
    warmup_steps: Annotated[int, Meta(ge=1, description="the first steps, which are computed")] = 3

    def __post_init__(self) -> None:
        check_fields(self)


class FirstBlockCache(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="method", tag="first_block"
):
    """The first block of the denoiser runs at every step, the others where what it adds has changed.

    :raises FieldError: a value is out of its range.
    """

    threshold: Annotated[
        float, Meta(gt=0, le=10, description="the others are skipped up to this relative change of what the first adds")
    ] = 0.1
    warmup_steps: Annotated[int, Meta(ge=1, description="the first steps, which are computed")] = 3
    max_skips: Annotated[int, Meta(ge=1, description="so many steps may be skipped one after the other")] = 3

    def __post_init__(self) -> None:
        check_fields(self)


StepCacheParams = TaylorCache | FirstBlockCache


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The choices of one request; None means the model's own default.

    Seeds: without a seed 42 is taken, output i uses seed + i, and the noise comes from a CPU generator unless
    `generator_device` says otherwise, so that a seed gives the same picture on every device.

    :raises InvalidRequest: a value is out of its range.
    """

    prompt: Annotated[str, Meta(description="what to generate")] = ""
    negative_prompt: Annotated[str | None, Meta(description="what to avoid (needs guidance)")] = None
    image_path: Annotated[
        tuple[str, ...],
        Meta(
            description="input image(s): files, http(s) or data URLs",
            extra={"aliases": ("image_paths",)},
        ),
    ] = ()
    height: Annotated[int, Meta(ge=1, description="height in pixels")] | None = None
    width: Annotated[int, Meta(ge=1, description="width in pixels")] | None = None
    num_frames: Annotated[int, Meta(ge=1, description="number of video frames; 1 for an image")] | None = None
    # Bounded because `inf` is a float, too, and the rate in a file is a fraction of two 32-bit integers.
    fps: Annotated[float, Meta(ge=0.1, le=1000, description="frames per second of the video")] | None = None
    num_inference_steps: Annotated[int, Meta(ge=1, description="number of denoising steps")] | None = None
    guidance_scale: Annotated[float, Meta(ge=0, description="classifier-free guidance scale")] | None = None
    guidance_scale_2: Annotated[float, Meta(ge=0, description="guidance scale of the second transformer")] | None = None
    true_cfg_scale: Annotated[float, Meta(ge=0, description="true guidance of guidance-distilled models")] | None = None
    guidance_rescale: Annotated[float, Meta(ge=0, le=1, description="rescaling of guided noise")] | None = None
    flow_shift: Annotated[float, Meta(gt=0, description="shift of the noise schedule of flow matching")] | None = None
    max_sequence_length: Annotated[int, Meta(ge=1, description="prompt length in tokens")] | None = None
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED, description="seed of the first output; output i uses seed + i")] = (
        DEFAULT_SEED
    )
    generator_device: Annotated[
        Literal["cpu", "cuda"], Meta(description="device that draws the noise; cpu gives the same noise everywhere")
    ] = "cpu"
    num_outputs_per_prompt: Annotated[int, Meta(ge=1, le=64, description="number of outputs")] = 1
    priority: Annotated[
        int, Meta(ge=-100, le=100, description="requests of a higher priority go first", extra={"is_scheduling": True})
    ] = 0
    deadline_s: (
        Annotated[
            float,
            Meta(
                gt=0,
                description="seconds in which it should be done; it goes first when it must, last when it can't",
                extra={"is_scheduling": True},
            ),
        ]
        | None
    ) = None
    exact: Annotated[
        bool, Meta(description="share no forward with other requests, so that company doesn't change a bit")
    ] = False
    cache: (
        Annotated[
            StepCacheParams,
            Meta(description="skip steps of the denoiser: method taylor or first_block, as docs/cache_dit.md says"),
        ]
        | None
    ) = None
    lora: (
        Annotated[
            tuple[LoraChoice, ...],
            Meta(
                max_length=MAX_LORAS,
                description="adapters: nickname=scale, path=scale, or JSON; default: those that the server has active",
                extra={"parse": lora_choice},
            ),
        ]
        | None
    ) = None
    enable_frame_interpolation: Annotated[bool, Meta(description="make frames between the frames of a video")] = False
    frame_interpolation_exp: Annotated[
        int, Meta(ge=1, le=4, description="1 for twice the frames a second, 2 for four times, up to 4")
    ] = 1
    frame_interpolation_scale: Annotated[
        float,
        Meta(ge=0.25, le=4, description="motion is estimated at so many times the resolution; 0.5 for large frames"),
    ] = 1.0
    frame_interpolation_model_path: (
        Annotated[
            str,
            Meta(
                min_length=1,
                max_length=4096,
                description="RIFE's weights (file, folder, hub id, owner/repo:file), or optical-flow, which needs none;"
                " default: RIFE if the hub's cache has it, else optical-flow",
            ),
        ]
        | None
    ) = None
    enable_upscaling: Annotated[bool, Meta(description="enlarge pictures or frames when they are done")] = False
    upscaling_model_path: (
        Annotated[
            str,
            Meta(
                min_length=1,
                max_length=4096,
                description="a network's weights (file, folder, hub id, owner/repo:file), or lanczos, which needs none;"
                " default: Real-ESRGAN from the hub",
            ),
        ]
        | None
    ) = None
    upscaling_scale: Annotated[int, Meta(ge=1, le=8, description="how many times larger each side becomes")] = 4
    bit_depth: Annotated[
        Literal[8, 16], Meta(description="bits for each channel of a picture; 16 needs PNG, and a VAE of fp32 or fp16")
    ] = 8
    num_previews: Annotated[
        int, Meta(ge=0, description="number of pictures sent while denoising goes on", extra={"is_flag": False})
    ] = 0
    diffusers_kwargs: Annotated[
        dict[str, Any], Meta(description="further keyword arguments of the pipeline's __call__ (JSON object)")
    ] = {}

    def __post_init__(self) -> None:
        try:
            check_fields(self)
        except FieldError as error:
            raise InvalidRequest(str(error), error.field) from None
        for name in self.__struct_fields__:
            for number in _numbers(getattr(self, name)):
                if not abs(number) <= MAX_NUMBER:
                    limit = f"numbers may be up to {MAX_NUMBER:.2g}, the largest of float32"
                    raise InvalidRequest(f"{name} is {number!r}: {limit}", name)
        if any(choice.nickname is None and choice.path is None for choice in self.lora or ()):
            raise InvalidRequest("each adapter in lora needs a nickname or a path", "lora")
        if self.bit_depth == 16 and (self.num_frames or 1) > 1:
            raise InvalidRequest("bit_depth is 16: frames of videos have 8 bits; ask for a picture", "bit_depth")
        if self.bit_depth == 16 and (self.enable_upscaling or self.enable_frame_interpolation):
            raise InvalidRequest(
                "bit_depth is 16: frames that are interpolated or enlarged have 8 bits; choose one", "bit_depth"
            )

    @property
    def frame_factor(self) -> int:
        """How many frames there are for each of the pipeline's, up to the last one."""
        return 2**self.frame_interpolation_exp if self.enable_frame_interpolation else 1

    @property
    def size_factor(self) -> int:
        """How many times larger each side is than the pipeline's."""
        return self.upscaling_scale if self.enable_upscaling else 1

    def num_frames_of(self, num_frames: int) -> int:
        """How many frames come out of so many of the pipeline's."""
        return (num_frames - 1) * self.frame_factor + 1

    def output(self, index: int) -> Self:
        """The params of output `index` alone, with its own seed."""
        return msgspec.structs.replace(self, seed=(self.seed + index) % (MAX_SEED + 1), num_outputs_per_prompt=1)


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a field, however deep: deeper than functions can call themselves, too."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case int() | float() as number:
                yield number
            case dict() as parts:
                waiting += parts.values()
            case list() | tuple() as parts:
                waiting += parts
            case msgspec.Struct() as fields:
                waiting += msgspec.structs.astuple(fields)
