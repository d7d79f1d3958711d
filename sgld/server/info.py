"""What the server is and how it does: health, models, settings."""

import time

import anyio
import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sgld import __version__
from sgld.errors import InvalidRequest
from sgld.events import Cancelled, Completed, Failed
from sgld.sampling_params import SamplingParams
from sgld.server.auth import ANYBODY
from sgld.server.bodies import unless_gone
from sgld.server.errors import ApiError, from_event, json_response
from sgld.server.requests import LiveRequest
from sgld.server.services import Services, services_of

# Some noise schedulers can't do one step.
_PROBE = SamplingParams(prompt="a red circle", num_inference_steps=2, num_frames=1)
_PROBE_TIMEOUT_S = 60.0


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model, as clients of OpenAI and SGLang know it."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "sgld"
    root: str
    pipeline_class: str | None
    num_gpus: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The models: there is one."""

    object: str = "list"
    data: list[ModelCard]


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """The model in SGLang's words."""

    model_path: str
    pipeline_name: str | None
    pipeline_class: str | None
    num_gpus: int
    dit_precision: str | None
    vae_precision: str | None


async def liveness(request: Request) -> Response:
    """GET /liveness: this process answers."""
    return json_response({"status": "ok"})


async def health(request: Request) -> Response:
    """GET /health: a request would be served now."""
    check_ready(services_of(request))
    return json_response({"status": "ok"})


async def health_generate(request: Request) -> Response:
    """GET /health_generate: a picture is really made, with two steps."""
    services = services_of(request)
    check_ready(services)

    async def probe() -> Response:
        with anyio.move_on_after(_PROBE_TIMEOUT_S):
            return await _probe(services)
        raise ApiError(503, f"no picture was made in {_PROBE_TIMEOUT_S:.0f} s", "unhealthy")

    return await unless_gone(request, probe)


async def models(request: Request) -> Response:
    """GET /v1/models."""
    return json_response(ModelList(data=[_card(services_of(request))]))


async def model(request: Request) -> Response:
    """GET /v1/models/{id}."""
    services = services_of(request)
    asked = request.path_params["id"]
    if asked not in (services.model_name, services.engine_config.model_path):
        message = f"there is no model {asked[:80]!r}; this server has {services.model_name}"
        raise ApiError(404, message, "model_not_found", param="model")
    return json_response(_card(services))


async def model_info(request: Request) -> Response:
    """GET /models, /model_info: the model in SGLang's words."""
    services = services_of(request)
    served = services.engine.model
    precisions = served.precisions if served else {}
    name = served.pipeline_class if served else None
    info = ServedModel(
        model_path=services.engine_config.model_path,
        pipeline_name=name,
        pipeline_class=name,
        num_gpus=services.engine_config.parallel.total,
        dit_precision=_precision(precisions.get("transformer") or precisions.get("unet")),
        vae_precision=_precision(precisions.get("vae")),
    )
    return json_response(info)


def _precision(dtype: str | None) -> str | None:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(dtype or "", dtype)


async def server_info(request: Request) -> Response:
    """GET /server_info: what was chosen when it was started, without secrets."""
    services = services_of(request)
    statistics = services.engine.statistics()
    info = {
        "version": __version__,
        "status": "ready" if services.engine.model else "loading",
        "model_path": services.engine_config.model_path,
        "served_model_name": services.model_name,
        "model": services.engine.model,
        "tp_size": services.engine_config.parallel.tp_size,
        "dp_size": services.engine_config.parallel.dp_size,
        "layout": services.engine_config.parallel.layout,
        "merging": statistics.merging,
        "num_running_reqs": services.requests.num_live,
        "engine": services.engine_config,
        "replicas": statistics.replicas,
        "storage": {
            "cloud": bool(services.jobs.storage.origins),
            "num_pending_files": await services.jobs.storage.num_pending(),
        },
        "limits": {name: getattr(services.config, name) for name in _LIMITS},
    }
    return json_response(info)


_LIMITS = ("max_pixels", "max_frames", "max_steps", "max_outputs", "max_prompt_chars", "max_body_bytes")


def check_ready(services: Services) -> None:
    """:raises ApiError: no request would be served now."""
    if services.stopping.is_set():
        raise ApiError(503, "the server is shutting down", "shutting_down")
    if services.engine.model is None:
        raise ApiError(503, "the model isn't ready; it is being loaded", "loading")


async def _probe(services: Services) -> Response:
    started_at = time.monotonic()

    async def finish(live: LiveRequest, completed: Completed) -> None:
        pass  # nobody wants to see it

    live = await services.requests.submit(_PROBE, kind="health", owner=ANYBODY, finish=finish)
    try:
        with live.subscribe() as events:
            async for event in events:
                # A model that needs more than a prompt says so: it answers.
                if isinstance(event, Failed | Cancelled) and event_code(event) != InvalidRequest.code:
                    raise ApiError(503, f"a test picture failed: {from_event(event)}", "unhealthy")
    finally:
        live.cancel()
    return json_response({"status": "ok", "took_s": round(time.monotonic() - started_at, 3)})


def event_code(event: Failed | Cancelled) -> str:
    """Why a request didn't end well."""
    return event.code if isinstance(event, Failed) else "cancelled"


def _card(services: Services) -> ModelCard:
    served = services.engine.model
    return ModelCard(
        id=services.model_name,
        created=services.started_at,
        root=services.engine_config.model_path,
        pipeline_class=served.pipeline_class if served else None,
        num_gpus=services.engine_config.parallel.total,
    )
