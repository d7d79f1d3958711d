"""What handlers need: made once, by whoever runs the app, and reached through the request."""

import time
from dataclasses import dataclass, field

import anyio
from prometheus_client import CollectorRegistry
from starlette.requests import Request

from sgld.config import EngineConfig, ServerConfig
from sgld.server.feed import Feed
from sgld.server.jobs import Jobs
from sgld.server.requests import Generates, Requests


@dataclass(frozen=True)
class Services:
    """The parts of a server.

    `stopping` is set when the server is told to leave: streams that only watch end then.
    """

    engine: Generates
    engine_config: EngineConfig
    config: ServerConfig
    requests: Requests
    jobs: Jobs
    feed: Feed
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    """The metrics."""
    stopping: anyio.Event = field(default_factory=anyio.Event)
    started_at: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_name(self) -> str:
        return self.config.served_model_name or self.engine_config.model_path


def services_of(request: Request) -> Services:
    """The services of the app that answers this request."""
    services: Services = request.app.state.services
    return services
