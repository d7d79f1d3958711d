"""What clients of videos send and get, under OpenAI's names and SGLang's."""

from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sgld.encoding import VideoCodec, VideoEncoding, X264Preset
from sgld.errors import InvalidRequest
from sgld.fields import FieldError
from sgld.media.animations import check_rate
from sgld.media.files import VideoFormat
from sgld.media.videos import check_encoder
from sgld.sampling_params import DEFAULT_FPS, SamplingParams
from sgld.server.job_store import Job, Status
from sgld.server.request_fields import (
    INTERPOLATION_FIELDS,
    SAMPLING_FIELDS,
    FileOptions,
    convert,
    in_words,
    understood,
    unpacked,
    words_of,
)
from sgld.storage import Upload

_SAMPLING = SAMPLING_FIELDS | {"num_frames", "fps"} | INTERPOLATION_FIELDS


class VideoOptions(FileOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of requests for videos that aren't sampling params."""

    seconds: (
        Annotated[str | float, Meta(description="length; num_frames says it in frames, and counts more")] | None
    ) = None
    quality: Annotated[
        Literal["auto", "standard", "hd", "low", "medium", "high"],
        Meta(description="without effect: choose num_inference_steps"),
    ] = "auto"
    input_reference: (
        Annotated[
            str | dict[str, str],
            Meta(description='the picture it begins with: its URL, {"image_url": URL}, or {"file_id": id of an image}'),
        ]
        | None
    ) = None
    reference_url: Annotated[str, Meta(description="the same, in SGLang's words")] | None = None
    output_format: Annotated[
        VideoFormat, Meta(description="mp4, or for short videos without sound an animated gif or webp")
    ] = "mp4"
    video_codec: Annotated[VideoCodec, Meta(description="codec of MP4; h264 plays everywhere")] = "h264"
    video_crf: (
        Annotated[int, Meta(ge=0, le=63, description="constant rate factor of MP4, in the place of a quality")] | None
    ) = None
    x264_preset: Annotated[X264Preset | None, Meta(description="effort of the encoders of h264 and hevc")] = None
    video_fragmented: Annotated[
        bool, Meta(description="MP4 in fragments, which goes to a bucket while it is encoded; seeking is slower")
    ] = False
    partial_images: Annotated[int, Meta(ge=0, le=20, description="previews in its events")] = 3

    @property
    def encoding(self) -> VideoEncoding:
        """:raises FieldError: the codec has no such setting."""
        names = VideoEncoding.__struct_fields__
        return VideoEncoding(**{name: getattr(self, name) for name in names})


class VideoRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request for videos, understood, but for the pictures that it begins with.

    :param words: what the client called fields that have other names here.
    """

    options: VideoOptions
    params: SamplingParams
    words: Mapping[str, str]


class VideoError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a video failed."""

    code: str
    message: str


class Video(msgspec.Struct, frozen=True, kw_only=True):
    """A job for videos, as clients see it."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    seconds: str
    size: str
    quality: Literal["standard"] = "standard"
    seed: int
    num_outputs: int
    eta_s: float | None
    remixed_from_video_id: str | None
    error: VideoError | None
    url: str | None
    urls: list[str]
    upload: Upload | None


class VideoList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


def video_request(given: Mapping[str, Any], *, model_fps: float | None, is_form: bool = False) -> VideoRequest:
    """Understand the fields of a request for videos.

    :param model_fps: frames per second that the model's author recommends.
    :param is_form: numbers and switches are strings.
    :raises ApiError: a field is unknown, or not served.
    :raises InvalidRequest: a field has a value that it can't have.
    :raises msgspec.ValidationError: a field has another type.
    """
    fields = unpacked(given)
    words = words_of(fields, "reference_url" if "reference_url" in given else "input_reference")
    with in_words(words):
        return _video_request(fields, model_fps, is_form, words)


def _video_request(
    given: Mapping[str, Any], model_fps: float | None, is_form: bool, words: Mapping[str, str]
) -> VideoRequest:
    options, sampling = understood(given, VideoOptions, _SAMPLING, is_form=is_form)
    try:
        check_encoder(options.encoding.video_codec)
    except FieldError as error:
        raise InvalidRequest(str(error), error.field) from None
    if not sampling.get("prompt"):
        raise InvalidRequest("there is no prompt", "prompt")
    params = convert({**sampling, "num_previews": options.partial_images}, SamplingParams, is_form)
    if params.bit_depth == 16:
        raise InvalidRequest("bit_depth is 16: frames of videos have 8 bits", "bit_depth")
    if params.num_frames is None and options.seconds is not None:
        fps = params.fps or model_fps or DEFAULT_FPS
        num_frames = max(1, round(_seconds(options.seconds) * fps))
        params = msgspec.structs.replace(params, num_frames=num_frames, fps=fps)
    if options.output_format != "mp4":
        check_rate(options.output_format, (params.fps or model_fps or DEFAULT_FPS) * params.frame_factor)
    return VideoRequest(options=options, params=params, words=words)


def _seconds(given: str | float) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not isfinite(seconds) or seconds <= 0:
        raise InvalidRequest(f"seconds is {str(given)[:40]!r}; it must be a positive number", "seconds")
    return seconds


def length_of(job: Job) -> str:
    """The length of a job's videos in seconds, as far as it is known."""
    params = job.asked.params
    num_frames, fps = (job.files[0].num_frames, job.files[0].fps) if job.files else (params.num_frames, params.fps)
    return f"{num_frames / fps:.3g}" if num_frames and fps else "auto"


def size_of_frames(job: Job) -> str:
    """The size of a job's videos, as far as it is known."""
    params = job.asked.params
    if job.files:
        return f"{job.files[0].width}x{job.files[0].height}"
    factor = params.size_factor
    return f"{params.width * factor}x{params.height * factor}" if params.width and params.height else "auto"
