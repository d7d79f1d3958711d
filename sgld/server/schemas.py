"""What clients of pictures send and get, under OpenAI's names and SGLang's."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sgld.errors import InvalidRequest
from sgld.media.files import ImageFormat
from sgld.sampling_params import SamplingParams
from sgld.server.request_fields import SAMPLING_FIELDS, FileOptions, convert, in_words, understood, unpacked, words_of
from sgld.storage import Upload

PartialType = Literal["image_generation.partial_image", "image_edit.partial_image"]
CompletedType = Literal["image_generation.completed", "image_edit.completed"]


class ImageOptions(FileOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of requests for pictures that aren't sampling params."""

    quality: Annotated[
        Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"],
        Meta(description="without effect: choose num_inference_steps"),
    ] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    output_format: Annotated[Literal["png", "jpeg", "jpg", "webp", "avif"], Meta(description="format of the file")] = (
        "png"
    )
    response_format: Annotated[Literal["b64_json", "url"], Meta(description="the picture itself, or where it is")] = (
        "b64_json"
    )
    stream: Annotated[bool | None, Meta(description="answer with server-sent events")] = None
    partial_images: Annotated[int, Meta(ge=0, le=3, description="previews in the stream")] | None = None
    progress_events: Annotated[bool, Meta(description="steps in the stream, too; OpenAI's clients don't know them")] = (
        False
    )
    wait: Annotated[
        bool,
        Meta(description="false: answer at once; /v1/requests/ID tells how far it is"),
    ] = True
    num_previews: Annotated[
        int, Meta(ge=0, le=100, description="previews for those who watch /v1/events, where there is no stream")
    ] = 0

    @property
    def format(self) -> ImageFormat:
        return "jpeg" if self.output_format == "jpg" else self.output_format


class ImageRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request for pictures, understood.

    :param words: what the client called fields that have other names here.
    """

    options: ImageOptions
    params: SamplingParams
    words: Mapping[str, str]


class TokenDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Part of `Usage`."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What OpenAI's clients expect; nothing is counted here, as nothing is charged."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int = 0
    total_tokens: int = 0


class ImageData(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One picture: itself, or its URL."""

    seed: int
    b64_json: bytes | None = None
    url: str | None = None
    upload: Upload | None = None


class ImagesResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a request for pictures."""

    id: str
    created: int
    data: list[ImageData]
    output_format: ImageFormat
    size: str
    background: Literal["opaque", "transparent"]
    usage: Usage = Usage()
    inference_time_s: float


class PartialImage(msgspec.Struct, frozen=True, kw_only=True):
    """An event of the stream: what the picture is going to be. `index` says of which, where there are several."""

    type: PartialType
    b64_json: bytes
    partial_image_index: int
    created_at: int
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque", "transparent"] = "opaque"
    output_format: ImageFormat
    index: int


class CompletedImage(msgspec.Struct, frozen=True, kw_only=True):
    """An event of the stream: a picture."""

    type: CompletedType
    b64_json: bytes
    created_at: int
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque", "transparent"]
    output_format: ImageFormat
    usage: Usage = Usage()
    index: int
    seed: int
    id: str
    upload: Upload | None = None


def image_request(
    given: Mapping[str, Any], *, images: tuple[str, ...] = (), mask: str | None = None, is_form: bool = False
) -> ImageRequest:
    """Understand the fields of a request for pictures.

    :param images: sources of the input pictures.
    :param mask: source of the mask.
    :param is_form: numbers and switches are strings.
    :raises ApiError: a field is unknown, or not served.
    :raises InvalidRequest: a field has a value that it can't have.
    :raises msgspec.ValidationError: a field has another type.
    """
    fields = unpacked(given)
    words = words_of(fields, "image")
    with in_words(words):
        return _image_request(fields, images, mask, is_form, words)


def _image_request(
    given: Mapping[str, Any], images: tuple[str, ...], mask: str | None, is_form: bool, words: Mapping[str, str]
) -> ImageRequest:
    options, sampling = understood(given, ImageOptions, SAMPLING_FIELDS, is_form=is_form)
    if options.stream and not options.wait:
        raise InvalidRequest("a stream is a way to wait: choose stream, or wait: false", "wait")
    if "prompt" not in sampling and not images:
        raise InvalidRequest("there is no prompt", "prompt")
    previews = options.partial_images or 0 if options.stream else options.num_previews
    # A video model gives a picture when it makes one frame; others take no notice.
    sampling |= {"num_frames": 1, "num_previews": previews, "image_path": images}
    params = convert(sampling, SamplingParams, is_form)
    if params.bit_depth == 16 and options.format != "png":
        raise InvalidRequest(f"bit_depth is 16: {options.format} has 8 bits; choose png", "bit_depth")
    if mask is not None:
        kwargs = {**params.diffusers_kwargs, "mask_image": {"$image": mask, "mode": "L"}}
        params = msgspec.structs.replace(params, diffusers_kwargs=kwargs)
    return ImageRequest(options=options, params=params, words=words)
