"""/openapi.json: OpenAPI 3.1, made of the routes, the docstrings of their handlers, and their types."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sgld import __version__
from sgld.config import ServerConfig
from sgld.media.files import MediaFormat, media_type_of
from sgld.sampling_params import SamplingParams
from sgld.server import events, images, info, login, loras, metrics, previews, video_events, videos
from sgld.server.errors import ErrorResponse, json_response
from sgld.server.schemas import (
    IGNORED,
    SAMPLING_FIELDS,
    CompletedImage,
    ImageOptions,
    ImagesResponse,
    PartialImage,
)
from sgld.server.services import services_of
from sgld.server.stats import ServerStats
from sgld.server.status import RequestProgress, RequestStatus
from sgld.server.video_schemas import Video, VideoList, VideoOptions
from sgld.server.watcher import EVENT_NAMES

Schema = dict[str, Any]
_JSON, _FORM, _SSE = "application/json", "multipart/form-data", "text/event-stream"
_FILE: Schema = {"type": "string", "format": "binary"}
_PICTURES = "image/png, image/jpeg, image/webp"
_OBJECT: Schema = {"type": "object"}
_REF = "#/components/schemas/{name}"
_STATES = ("queued", "running", "completed", "failed", "cancelled")
_ERRORS = {
    400: "a value can't be what it is; `param` names the field",
    401: "no known key",
    403: "a foreign host, or a page of another origin",
    404: "there is no such thing, or it belongs to another key",
    409: "the request was cancelled",
    416: "there is no such part of the file",
    413: "the body is too large",
    415: "the body is of another type",
    429: "the queue is full; see `retry-after`",
    500: "the request failed",
    503: "the model isn't ready, or the server is shutting down",
}
_ALWAYS = (401, 403)
_MAKING = (400, 404, 409, 413, 415, 429, 500, 503)


def _ref(struct: type[msgspec.Struct] | str) -> Schema:
    return {"$ref": _REF.format(name=struct if isinstance(struct, str) else struct.__name__)}


def _event(names: Iterable[str], *data: type[msgspec.Struct]) -> Schema:
    """Schema of each event of a stream."""
    content = {"anyOf": [*map(_ref, data), _OBJECT]}
    text = {"type": "string", "contentMediaType": _JSON, "contentSchema": content}
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
    return Spec(tag, queries=queries, answers={200: {_JSON: _ref(struct)}}, errors=errors)


def _changes_loras(body: type[msgspec.Struct], *errors: int) -> Spec:
    return Spec(
        "LoRA", bodies={_JSON: _ref(body)}, answers={200: {_JSON: _ref(loras.LoraDone)}}, errors=(400, 413, *errors)
    )


_IMAGE_EVENTS = {
    f"image_{verb}.{what}" for verb in ("generation", "edit") for what in ("partial_image", "completed", "progress")
}
_IMAGES: Mapping[int, Mapping[str, Schema]] = {
    200: {
        _JSON: _ref(ImagesResponse),
        _SSE: _event({*_IMAGE_EVENTS, "error"}, PartialImage, CompletedImage),
    },
    202: {_JSON: _ref(RequestStatus)},
}
_DELETED = {200: {_JSON: _ref(events.Deleted)}}
_NEWS = _event(
    {"snapshot", *EVENT_NAMES}, events.Snapshot, RequestStatus, RequestProgress, previews.PreviewEvent, ServerStats
)
_FILM: Mapping[str, Schema] = {media_type_of(name): _FILE for name in get_args(MediaFormat)}
_PICTURE: Mapping[int, Mapping[str, Schema]] = {200: {n: _FILE for n in _FILM if n.startswith("image/")}}
_NUMBER: Schema = {"type": "integer", "minimum": 0, "default": 0}
_EDIT = Spec("Pictures", bodies={_FORM: _ref("ImageEdit")}, answers=_IMAGES, errors=_MAKING, pictures=("image", "mask"))
SPECS: dict[Callable[..., Any], Spec] = {
    images.generations: Spec("Pictures", bodies={_JSON: _ref("ImageGeneration")}, answers=_IMAGES, errors=_MAKING),
    images.edits: _EDIT,
    images.variations: _EDIT,
    images.get_image: Spec("Pictures", answers={200: {_JSON: _OBJECT}}, errors=(404,)),
    images.get_content: Spec("Pictures", queries={"variant": _NUMBER}, answers=_PICTURE, errors=(404,)),
    images.delete_image: Spec("Pictures", answers=_DELETED, errors=(404,)),
    videos.create: Spec(
        "Videos",
        bodies={_JSON: _ref("VideoGeneration"), _FORM: _ref("VideoUpload")},
        answers={200: {_JSON: _ref(Video)}},
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
    videos.remix: Spec(
        "Videos", bodies={_JSON: _ref("VideoRemix")}, answers={200: {_JSON: _ref(Video)}}, errors=_MAKING
    ),
    videos.get_content: Spec(
        "Videos",
        queries={"variant": {"enum": ["video", "thumbnail", "spritesheet"], "default": "video"}, "index": _NUMBER},
        answers=dict.fromkeys((200, 206), _FILM),
        errors=(400, 404, 409, 416, 500),
    ),
    video_events.events: Spec(
        "Videos",
        answers={200: {_SSE: {"type": "object", "properties": {"data": {"type": "string"}}}}},
        errors=(404, 503),
    ),
    video_events.stream: Spec("Videos", queries={"index": _NUMBER}, answers={200: _FILM}, errors=(404, 409, 500, 503)),
    events.events: Spec(
        "Live events",
        queries={"types": {"type": "string"}, "request_id": {"type": "string"}},
        answers={200: {_SSE: _NEWS}},
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
    events.request_events: Spec("Live events", answers={200: {_SSE: _NEWS}, 204: {}}, errors=(404, 503)),
    events.get_preview: Spec(
        "Live events", queries={"output": _NUMBER}, answers={200: {"image/jpeg": _FILE}}, errors=(404,)
    ),
    loras.set_lora: _changes_loras(loras.SetLora, 415, 500, 503),
    loras.merge_lora_weights: _changes_loras(loras.SwitchLora, 415),
    loras.unmerge_lora_weights: _changes_loras(loras.SwitchLora, 415),
    loras.list_loras: _gives("LoRA", loras.LoraList),
    loras.unload_lora: _changes_loras(loras.UnloadLora, 404, 415),
    loras.delete_lora: _gives("LoRA", loras.LoraDone, 404),
    info.liveness: Spec("Server", answers={200: {_JSON: _OBJECT}}),
    info.health: Spec("Server", answers={200: {_JSON: _OBJECT}}, errors=(503,)),
    info.health_generate: Spec("Server", answers={200: {_JSON: _OBJECT}}, errors=(429, 503)),
    info.models: _gives("Server", info.ModelList),
    info.model: _gives("Server", info.ModelCard, 404),
    info.model_info: _gives("Server", info.ServedModel),
    info.server_info: Spec("Server", answers={200: {_JSON: _OBJECT}}),
    metrics.metrics: Spec("Server", answers={200: {"text/plain": {"type": "string"}}}),
    login.get_login: _gives("Server", login.LoginState),
    login.login: Spec(
        "Server",
        bodies={_JSON: _ref(login.Login)},
        answers={200: {_JSON: _ref(login.LoginState)}},
        errors=(400, 413, 415),
    ),
    login.logout: _gives("Server", login.LoginState),
}
_TYPES = (
    ErrorResponse,
    ImagesResponse,
    PartialImage,
    CompletedImage,
    RequestStatus,
    RequestProgress,
    ServerStats,
    Video,
    VideoList,
    events.RequestList,
    previews.PreviewEvent,
    events.Deleted,
    info.ModelList,
    info.ServedModel,
    loras.SetLora,
    loras.SwitchLora,
    loras.UnloadLora,
    loras.LoraDone,
    loras.LoraList,
    login.Login,
    login.LoginState,
)


async def openapi(request: Request) -> Response:
    """GET /openapi.json."""
    return json_response(document(request.app.routes, services_of(request).config))


def document(routes: Iterable[Route], config: ServerConfig) -> Schema:
    """The document of these routes; those that have no spec are pages.

    :param config: has limits of this server.
    """
    paths: dict[str, Schema] = {}
    for route in routes:
        if (spec := SPECS.get(route.endpoint)) is not None:
            (method,) = (route.methods or set()) - {"HEAD"}
            paths.setdefault(route.path.replace(":path}", "}"), {})[method.lower()] = _operation(route, spec)
    return {
        "openapi": "3.1.0",
        "info": {"title": "sgld", "version": __version__, "description": "Pictures and videos by diffusion models."},
        "paths": paths,
        "components": {
            "schemas": _components(config),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "cookie": {"type": "apiKey", "in": "cookie", "name": "sgld_session"},
            },
        },
        "security": [{}, {"key": []}, {"cookie": []}],
    }


def _operation(route: Route, spec: Spec) -> Schema:
    summary = (route.endpoint.__doc__ or "").partition("\n")[0].partition(": ")[2].rstrip(".")
    operation: Schema = {
        "operationId": route.endpoint.__name__,
        "tags": [spec.tag],
        "summary": summary or route.path,
        "parameters": list(_parameters(route, spec)),
        "responses": {str(status): _answer(status, content) for status, content in spec.answers.items()}
        | {str(status): _error(status) for status in sorted({*spec.errors, *_ALWAYS})},
    }
    if spec.bodies:
        content = _content(spec.bodies)
        if spec.pictures:
            content[_FORM]["encoding"] = {name: {"contentType": _PICTURES} for name in spec.pictures}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _parameters(route: Route, spec: Spec) -> Iterator[Schema]:
    for name in route.param_convertors:
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    for name, schema in spec.queries.items():
        yield {"name": name, "in": "query", "required": False, "schema": schema}


def _answer(status: int, content: Mapping[str, Schema]) -> Schema:
    return {"description": "accepted" if status == 202 else "done", "content": _content(content)}


def _error(status: int) -> Schema:
    return {"description": _ERRORS[status], "content": _content({_JSON: _ref(ErrorResponse)})}


def _content(schemas: Mapping[str, Schema]) -> Schema:
    return {media_type: {"schema": schema} for media_type, schema in schemas.items()}


def _limited(schemas: Schema, config: ServerConfig) -> Schema:
    """Properties with the limits of this server."""
    limits = {
        "prompt": {"maxLength": config.max_prompt_chars},
        "negative_prompt": {"maxLength": config.max_prompt_chars},
        "n": {"maximum": config.max_outputs},
        "num_inference_steps": {"maximum": config.max_steps},
        "num_frames": {"maximum": config.max_frames},
    }
    return {name: schema | limits[name] if name in limits else schema for name, schema in schemas.items()}


def _in_form(schema: Schema) -> Schema:
    """What a field of a form can be: one value; nothing is said by leaving it out."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind.get("type") not in ("null", "array")]
    rest = {name: value for name, value in schema.items() if name not in ("anyOf", "default")}
    if len(kinds) == 1:
        return rest | _in_form(kinds[0])
    return rest | {"anyOf": kinds} if kinds else {"type": "string"} | rest if "enum" not in rest else rest


def _components(config: ServerConfig) -> Schema:
    structs = [*_TYPES, ImageOptions, VideoOptions, SamplingParams]
    schemas = dict(msgspec.json.schema_components(structs, ref_template=_REF)[1])
    options, of_videos, params = (
        schemas.pop(struct.__name__)["properties"] for struct in (ImageOptions, VideoOptions, SamplingParams)
    )
    shared = {name: schema for name, schema in params.items() if name in SAMPLING_FIELDS}
    shared |= {name: {"description": "accepted, without effect"} for name in sorted(IGNORED)}
    prompt = _limited({"prompt": {"description": "what to generate", "type": "string", "minLength": 1}}, config)
    of_images = _limited(shared | options, config)
    of_videos = _limited(shared | {name: params[name] for name in ("num_frames", "fps")} | of_videos, config)
    uploads = {"image": {"type": "array", "items": _FILE, "minItems": 1, "maxItems": 16}, "mask": _FILE}
    uploads["url"] = {"description": "of a picture, in the place of a file", "type": "string", "pattern": "^https?://"}
    forms = [{name: _in_form(schema) for name, schema in fields.items()} for fields in (of_images, of_videos)]
    schemas["ImageGeneration"] = _struct("A request for pictures.", of_images | prompt, "prompt")
    schemas["ImageEdit"] = _struct("Pictures made of others.", forms[0] | uploads, "image")
    schemas["VideoGeneration"] = _struct("A request for a video.", of_videos | prompt, "prompt")
    schemas["VideoUpload"] = _struct("The same, with a file.", forms[1] | prompt | {"input_reference": _FILE}, "prompt")
    schemas["VideoRemix"] = _struct("The same with another prompt.", prompt, "prompt")
    # A snapshot has its requests as they were encoded.
    schemas["Snapshot"] = _struct(
        "All that is known.",
        {
            "part": {"type": "integer"},
            "num_parts": {"type": "integer"},
            "requests": {"type": "array", "items": _ref(RequestStatus)},
            "server": _OBJECT,
            "stats": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
        },
        "part",
        "num_parts",
        "requests",
    )
    return schemas


def _struct(title: str, properties: Schema, *required: str) -> Schema:
    return {
        "type": "object",
        "description": title,
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }
