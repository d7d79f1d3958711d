"""The ASGI app: routes and middleware, nothing else."""

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from sgld.errors import SgldError
from sgld.server import events, images, info, login, loras, metrics, openapi, pages, video_events, videos
from sgld.server.auth import Auth, Keys, LocalOnly, is_loopback
from sgld.server.drain import Drain
from sgld.server.edge import Activity, Edge
from sgld.server.errors import ApiError, on_error
from sgld.server.limits import BodyLimit
from sgld.server.services import Services

ROUTES = [
    Route("/", pages.dashboard),
    Route("/dashboard.css", pages.asset),
    Route("/dashboard.js", pages.asset),
    Route("/docs", pages.docs),
    Route("/docs.js", pages.asset),
    Route("/openapi.json", openapi.openapi),
    Route("/liveness", info.liveness),
    Route("/health", info.health),
    Route("/health_generate", info.health_generate),
    Route("/server_info", info.server_info),
    Route("/models", info.model_info),
    Route("/model_info", info.model_info),
    Route("/metrics", metrics.metrics),
    Route("/v1/models", info.models),
    Route("/v1/models/{id:path}", info.model),
    Route("/v1/images/generations", images.generations, methods=["POST"]),
    Route("/v1/images/edits", images.edits, methods=["POST"]),
    Route("/v1/images/variations", images.variations, methods=["POST"]),
    Route("/v1/images/{id}", images.get_image, methods=["GET"]),
    Route("/v1/images/{id}", images.delete_image, methods=["DELETE"]),
    Route("/v1/images/{id}/content", images.get_content, methods=["GET"]),
    Route("/login", login.get_login, methods=["GET"]),
    Route("/login", login.login, methods=["POST"]),
    Route("/login", login.logout, methods=["DELETE"]),
    Route("/v1/events", events.events),
    Route("/v1/requests", events.list_requests),
    Route("/v1/requests/{id}", events.get_request, methods=["GET"]),
    Route("/v1/requests/{id}", events.delete_request, methods=["DELETE"]),
    Route("/v1/requests/{id}/events", events.request_events),
    Route("/v1/requests/{id}/preview", events.get_preview),
    Route("/v1/set_lora", loras.set_lora, methods=["POST"]),
    Route("/v1/merge_lora_weights", loras.merge_lora_weights, methods=["POST"]),
    Route("/v1/unmerge_lora_weights", loras.unmerge_lora_weights, methods=["POST"]),
    Route("/v1/list_loras", loras.list_loras),
    Route("/v1/unload_lora", loras.unload_lora, methods=["POST"]),
    Route("/v1/loras/{nickname:path}", loras.delete_lora, methods=["DELETE"]),
    Route("/v1/videos", videos.create, methods=["POST"]),
    Route("/v1/videos", videos.list_videos, methods=["GET"]),
    Route("/v1/videos/{id}", videos.get_video, methods=["GET"]),
    Route("/v1/videos/{id}", videos.delete_video, methods=["DELETE"]),
    Route("/v1/videos/{id}/content", videos.get_content, methods=["GET"]),
    Route("/v1/videos/{id}/cancel", videos.cancel_video, methods=["POST"]),
    Route("/v1/videos/{id}/remix", videos.remix, methods=["POST"]),
    Route("/v1/videos/{id}/events", video_events.events, methods=["GET"]),
    Route("/v1/videos/{id}/stream", video_events.stream, methods=["GET"]),
]


def create_app(services: Services, keys: Keys, activity: Activity) -> Starlette:
    """The app that serves these services.

    :param keys: what clients must present; empty: nothing.
    :param activity: counts what is being answered.
    """
    config = services.config
    middleware = [
        Middleware(Drain),
        Middleware(Edge, activity=activity, log_requests=config.log_requests),
    ]
    if is_loopback(config.host):
        middleware += [Middleware(LocalOnly, allowed_hosts=config.allowed_hosts, origins=config.cors_origins)]
    if config.cors_origins:
        middleware += [
            Middleware(
                CORSMiddleware,
                allow_origins=config.cors_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        ]
    middleware += [
        Middleware(Auth, keys=keys),
        Middleware(BodyLimit, max_bytes=config.max_body_bytes),
    ]
    handled = (ApiError, SgldError, msgspec.MsgspecError, HTTPException, OSError, RecursionError)
    app = Starlette(routes=ROUTES, middleware=middleware, exception_handlers=dict.fromkeys(handled, on_error))
    app.state.services = services
    app.state.keys = keys
    activity.paths = {route.endpoint: route.path for route in ROUTES}
    services.registry.register(metrics.ServerCollector(services, activity))
    return app
