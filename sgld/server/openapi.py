"""/openapi.json: OpenAPI 3.1, made of the routes, the docstrings of their handlers, and their types."""

from collections.abc import Iterable, Iterator, Mapping

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sgld import __version__
from sgld.config import ServerConfig
from sgld.sampling_params import SamplingParams
from sgld.server import events, info, login, loras, previews
from sgld.server.errors import ErrorResponse, json_response
from sgld.server.request_fields import IGNORED, SAMPLING_FIELDS
from sgld.server.schemas import CompletedImage, ImageOptions, ImagesResponse, PartialImage
from sgld.server.services import services_of
from sgld.server.specs import FILE, FORM, JSON, OBJECT, REF, SPECS, Schema, Spec, ref
from sgld.server.stats import ServerStats
from sgld.server.status import RequestProgress, RequestStatus
from sgld.server.video_schemas import Video, VideoList, VideoOptions

_PICTURES = "image/png, image/jpeg, image/webp"
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
            content[FORM]["encoding"] = {name: {"contentType": _PICTURES} for name in spec.pictures}
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
    return {"description": _ERRORS[status], "content": _content({JSON: ref(ErrorResponse)})}


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
    schemas = dict(msgspec.json.schema_components(structs, ref_template=REF)[1])
    options, of_videos, params = (
        schemas.pop(struct.__name__)["properties"] for struct in (ImageOptions, VideoOptions, SamplingParams)
    )
    shared = {name: schema for name, schema in params.items() if name in SAMPLING_FIELDS}
    shared |= {name: {"description": "accepted, without effect"} for name in sorted(IGNORED)}
    prompt = _limited({"prompt": {"description": "what to generate", "type": "string", "minLength": 1}}, config)
    of_images = _limited(shared | options, config)
    of_videos = _limited(shared | {name: params[name] for name in ("num_frames", "fps")} | of_videos, config)
    uploads = {"image": {"type": "array", "items": FILE, "minItems": 1, "maxItems": 16}, "mask": FILE}
    uploads["url"] = {"description": "of a picture, in the place of a file", "type": "string", "pattern": "^https?://"}
    forms = [{name: _in_form(schema) for name, schema in fields.items()} for fields in (of_images, of_videos)]
    schemas["ImageGeneration"] = _struct("A request for pictures.", of_images | prompt, "prompt")
    # Beside these there may be files that diffusers_kwargs names.
    files = {"additionalProperties": FILE}
    schemas["ImageEdit"] = _struct("Pictures made of others.", forms[0] | uploads) | files
    schemas["VideoGeneration"] = _struct("A request for a video.", of_videos | prompt, "prompt")
    schemas["VideoUpload"] = (
        _struct("The same, with a file.", forms[1] | prompt | {"input_reference": FILE}, "prompt") | files
    )
    schemas["VideoRemix"] = _struct("The same with another prompt.", prompt, "prompt")
    schemas["Snapshot"] = _snapshot()
    return schemas


def _snapshot() -> Schema:
    """It has its requests as they were encoded, which their types don't tell."""
    properties = {
        "part": {"type": "integer"},
        "num_parts": {"type": "integer"},
        "requests": {"type": "array", "items": ref(RequestStatus)},
        "server": OBJECT,
        "stats": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
    }
    return _struct("All that is known.", properties, "part", "num_parts", "requests")


def _struct(title: str, properties: Schema, *required: str) -> Schema:
    return {
        "type": "object",
        "description": title,
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }
