"""What each handler takes and gives, beside what its docstring says: a table, for /openapi.json."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import msgspec

from sgld.media.files import MediaFormat, media_type_of
from sgld.server import events, images, info, login, loras, metrics, previews, video_events, videos
from sgld.server.schemas import CompletedImage, ImagesResponse, PartialImage
from sgld.server.stats import ServerStats
from sgld.server.status import RequestProgress, RequestStatus
from sgld.server.video_schemas import Video, VideoList
from sgld.server.watcher import EVENT_NAMES

Schema = dict[str, Any]
JSON, FORM, SSE = "application/json", "multipart/form-data", "text/event-stream"
FILE: Schema = {"type": "string", "format": "binary"}
OBJECT: Schema = {"type": "object"}
REF = "#/components/schemas/{name}"
_STATES = ("queued", "running", "completed", "failed", "cancelled")
_MAKING = (400, 404, 409, 413, 415, 429, 500, 503)


def ref(struct: type[msgspec.Struct] | str) -> Schema:
    return {"$ref": REF.format(name=struct if isinstance(struct, str) else struct.__name__)}


def _event(names: Iterable[str], *data: type[msgspec.Struct]) -> Schema:
    """Schema of each event of a stream."""
    content = {"anyOf": [*map(ref, data), OBJECT]}
    text = {"type": "string", "contentMediaType": JSON, "contentSchema": content}
    return {"type": "object", "properties": {"event": {"enum": sorted(names)}, "data": text}}


@dataclass(frozen=True)
class Spec:
    """What a handler takes and gives, beside what its docstring says.

    :ivar queries: query parameters and their schemas.
    :ivar bodies: schemas of the body by media type.
    :ivar answers: schemas of what it gives by media type, with their status.
    :ivar errors: statuses of its errors, beside those that every handler has.
    """

    tag: str
    queries: Mapping[str, Schema] = field(default_factory=dict)
    bodies: Mapping[str, Schema] = field(default_factory=dict)
    answers: Mapping[int, Mapping[str, Schema]] = field(default_factory=dict)
    errors: tuple[int, ...] = ()
    pictures: tuple[str, ...] = ()
    """Fields of a form that are files of pictures."""


def _gives(tag: str, struct: type[msgspec.Struct], *errors: int, **queries: Schema) -> Spec:
    """A handler that takes no body and gives one type."""
    return Spec(tag, queries=queries, answers={200: {JSON: ref(struct)}}, errors=errors)


def _changes_loras(body: type[msgspec.Struct], *errors: int) -> Spec:
    return Spec(
        "LoRA", bodies={JSON: ref(body)}, answers={200: {JSON: ref(loras.LoraDone)}}, errors=(400, 413, *errors)
    )


_IMAGE_EVENTS = {
    f"image_{verb}.{what}" for verb in ("generation", "edit") for what in ("partial_image", "completed", "progress")
}
_IMAGES: Mapping[int, Mapping[str, Schema]] = {
    200: {
        JSON: ref(ImagesResponse),
        SSE: _event({*_IMAGE_EVENTS, "error"}, PartialImage, CompletedImage),
    },
    202: {JSON: ref(RequestStatus)},
}
_DELETED = {200: {JSON: ref(events.Deleted)}}
_NEWS = _event(
    {"snapshot", *EVENT_NAMES}, events.Snapshot, RequestStatus, RequestProgress, previews.PreviewEvent, ServerStats
)
_FILES: Mapping[str, Schema] = {media_type_of(name): FILE for name in get_args(MediaFormat)}
_PICTURE: Mapping[int, Mapping[str, Schema]] = {200: {n: FILE for n in _FILES if n.startswith("image/")}}
_NUMBER: Schema = {"type": "integer", "minimum": 0, "default": 0}
_EDIT = Spec("Pictures", bodies={FORM: ref("ImageEdit")}, answers=_IMAGES, errors=_MAKING, pictures=("image", "mask"))
SPECS: dict[Callable[..., Any], Spec] = {
    images.generations: Spec("Pictures", bodies={JSON: ref("ImageGeneration")}, answers=_IMAGES, errors=_MAKING),
    images.edits: _EDIT,
    images.variations: _EDIT,
    images.get_image: Spec("Pictures", answers={200: {JSON: OBJECT}}, errors=(404,)),
    images.get_content: Spec("Pictures", queries={"variant": _NUMBER}, answers=_PICTURE, errors=(404,)),
    images.delete_image: Spec("Pictures", answers=_DELETED, errors=(404,)),
    videos.create: Spec(
        "Videos",
        bodies={JSON: ref("VideoGeneration"), FORM: ref("VideoUpload")},
        answers={200: {JSON: ref(Video)}},
        errors=_MAKING,
        pictures=("input_reference",),
    ),
    videos.list_videos: _gives(
        "Videos",
        VideoList,
        400,
        after={"type": "string"},
        limit={"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
        order={"enum": ["asc", "desc"], "default": "desc"},
    ),
    videos.get_video: _gives("Videos", Video, 404),
    videos.delete_video: Spec("Videos", answers=_DELETED, errors=(404,)),
    videos.cancel_video: _gives("Videos", Video, 404),
    videos.remix: Spec("Videos", bodies={JSON: ref("VideoRemix")}, answers={200: {JSON: ref(Video)}}, errors=_MAKING),
    videos.get_content: Spec(
        "Videos",
        queries={"variant": {"enum": ["video", "thumbnail", "spritesheet"], "default": "video"}, "index": _NUMBER},
        answers=dict.fromkeys((200, 206), _FILES),
        errors=(400, 404, 409, 416, 500),
    ),
    video_events.events: Spec(
        "Videos",
        answers={200: {SSE: {"type": "object", "properties": {"data": {"type": "string"}}}}},
        errors=(404, 503),
    ),
    video_events.stream: Spec("Videos", queries={"index": _NUMBER}, answers={200: _FILES}, errors=(404, 409, 500, 503)),
    events.events: Spec(
        "Live events",
        queries={"types": {"type": "string"}, "request_id": {"type": "string"}},
        answers={200: {SSE: _NEWS}},
        errors=(400, 503),
    ),
    events.list_requests: _gives(
        "Live events",
        events.RequestList,
        400,
        limit={"type": "integer", "minimum": 1, "maximum": 1000, "default": 100},
        status={"enum": list(_STATES)},
    ),
    events.get_request: _gives("Live events", RequestStatus, 404),
    events.delete_request: Spec("Live events", answers=_DELETED, errors=(404,)),
    events.request_events: Spec("Live events", answers={200: {SSE: _NEWS}, 204: {}}, errors=(404, 503)),
    events.get_preview: Spec(
        "Live events", queries={"output": _NUMBER}, answers={200: {"image/jpeg": FILE}}, errors=(404,)
    ),
    loras.set_lora: _changes_loras(loras.SetLora, 415, 500, 503),
    loras.merge_lora_weights: _changes_loras(loras.SwitchLora, 415),
    loras.unmerge_lora_weights: _changes_loras(loras.SwitchLora, 415),
    loras.list_loras: _gives("LoRA", loras.LoraList),
    loras.unload_lora: _changes_loras(loras.UnloadLora, 404, 415),
    loras.delete_lora: _gives("LoRA", loras.LoraDone, 404),
    info.liveness: Spec("Server", answers={200: {JSON: OBJECT}}),
    info.health: Spec("Server", answers={200: {JSON: OBJECT}}, errors=(503,)),
    info.health_generate: Spec("Server", answers={200: {JSON: OBJECT}}, errors=(429, 503)),
    info.models: _gives("Server", info.ModelList),
    info.model: _gives("Server", info.ModelCard, 404),
    info.model_info: _gives("Server", info.ServedModel),
    info.server_info: Spec("Server", answers={200: {JSON: OBJECT}}),
    metrics.metrics: Spec("Server", answers={200: {"text/plain": {"type": "string"}}}),
    login.get_login: _gives("Server", login.LoginState),
    login.login: Spec(
        "Server",
        bodies={JSON: ref(login.Login)},
        answers={200: {JSON: ref(login.LoginState)}},
        errors=(400, 413, 415),
    ),
    login.logout: _gives("Server", login.LoginState),
}
