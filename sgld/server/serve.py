"""Runs the app on Hypercorn until it is told to leave.

Hypercorn's own shutdown waits for clients that keep their connection, on Python 3.12 and later for ever (its issue
308). So first the app comes to rest: new requests are refused, those under way get their time. Then Hypercorn is told,
and if it doesn't leave, it is cancelled.
"""

import errno
import gc
import logging
import signal
import socket
import ssl
import time
from asyncio import InvalidStateError
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import anyio
from anyio import CancelScope
from anyio.abc import TaskStatus
from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.config import Config
from starlette.types import ASGIApp, Receive, Scope, Send

from sgld.config import EngineConfig, ServerConfig, data_root
from sgld.media.hook import load_hook
from sgld.media.inputs import InputPolicy
from sgld.messages import ModelInfo
from sgld.outcome import on_failure
from sgld.server import images, videos
from sgld.server.app import create_app
from sgld.server.auth import Keys, read_keys
from sgld.server.edge import Activity
from sgld.server.feed import MAX_ENDED, Feed
from sgld.server.image_work import image_work
from sgld.server.job_store import JobStore
from sgld.server.jobs import Jobs, Works
from sgld.server.limits import limits_of
from sgld.server.metrics import RequestMetrics
from sgld.server.requests import Generates, Requests
from sgld.server.services import Services
from sgld.server.stats import stats_after
from sgld.server.video_work import video_work
from sgld.storage.cloud import open_storage
from sgld.storage.settings import resolved

logger = logging.getLogger(__name__)

# For connections to be closed in order; answers that are complete still have to leave.
_CLOSE_S = 1.0
_STATS_S = 1.0


class Serves(Generates, Protocol):
    """An engine that can be waited for."""

    async def ready(self) -> ModelInfo:
        """Wait until the model is loaded."""


EngineFactory = Callable[[EngineConfig], AbstractAsyncContextManager[Serves]]


@dataclass(frozen=True)
class Listener:
    """What a server needs of this machine, checked and taken before a model is loaded."""

    config: ServerConfig
    socket: socket.socket
    keys: Keys
    folder: Path
    store: JobStore

    @property
    def url(self) -> str:
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        scheme = "https" if self.config.ssl_certfile else "http"
        return f"{scheme}://{host}:{self.socket.getsockname()[1]}"


def listen(config: ServerConfig) -> Listener:
    """Take the address, and see that all files can be used.

    :raises OSError: the address is in use, or a file can't be used.
    :raises ValueError: a setting can't be used.
    """
    keys = Keys(read_keys(config))
    resolved(config.storage)
    load_hook(config.storage.output_hook)
    if bool(config.ssl_certfile) != bool(config.ssl_keyfile):
        raise ValueError("ssl_certfile and ssl_keyfile belong together; give both or none")
    if config.ssl_certfile:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    folder = Path(config.data_dir).expanduser() if config.data_dir else data_root()
    folder.mkdir(parents=True, exist_ok=True)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listening = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        what_to_do = "choose another --port, or stop the program that uses it"
        raise OSError(f"{config.host}:{config.port} is in use: {what_to_do}") from None
    with on_failure(listening.close):
        return Listener(config, listening, keys, folder, JobStore(folder / "jobs.sqlite3"))


async def serve(
    engine_config: EngineConfig,
    listener: Listener,
    engine_factory: EngineFactory,
    *,
    task_status: TaskStatus[Services] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until SIGINT or SIGTERM, or until `stopping` of its services is set.

    Clients can connect, and wait, while the model is loaded.

    :raises ModelError: the model can't be served (inside an exception group).
    :raises StorageError: the bucket can't be used.
    """
    config = listener.config
    inputs = InputPolicy(
        allow_private_hosts=config.allow_private_urls, max_bytes=config.max_body_bytes, max_pixels=config.max_pixels
    )
    # The socket, too, unless Hypercorn has it by then.
    with closing(listener.store), closing(listener.socket):
        # The bucket first: that it can't be used is said before a model is loaded.
        async with (
            open_storage(config.storage, listener.folder) as storage,
            engine_factory(engine_config) as engine,
            Requests(engine, inputs, limits_of(config)) as requests,
        ):
            jobs = Jobs(
                listener.store,
                requests,
                storage,
                folder=listener.folder / "inputs",
                policy=inputs,
                model_path=engine_config.model_path,
                config=config,
            )
            services = Services(engine, engine_config, config, requests, jobs, Feed())
            await _observe(services)
            await _run(services, listener, engine.ready, task_status)


async def _observe(services: Services) -> None:
    """Have those hear of each event who watch all requests."""
    services.feed.recall(await services.jobs.latest(MAX_ENDED))
    counted = RequestMetrics(services.registry)
    services.requests.observers += [
        services.feed.observe,
        lambda live, event: counted.observe(live, event, time.monotonic()),
    ]


async def _run(
    services: Services, listener: Listener, ready: Callable[[], Awaitable[ModelInfo]], task_status: TaskStatus[Services]
) -> None:
    """Work on jobs and answer clients until the server is told to leave."""
    works: Works = {images.KIND: partial(image_work, services), videos.KIND: partial(video_work, services)}
    async with services.jobs.open(works), anyio.create_task_group() as tasks:
        tasks.start_soon(_watch_signals, services, tasks.cancel_scope)
        tasks.start_soon(_wait_ready, ready)
        tasks.start_soon(services.feed.run)
        tasks.start_soon(_tell_stats, services)
        tasks.start_soon(_serve_http, services, listener, tasks.cancel_scope)
        task_status.started(services)


async def _wait_ready(ready: Callable[[], Awaitable[ModelInfo]]) -> None:
    """See that the model is served.

    What was imported by then stays: to look through it for garbage again and again took a tenth of the loop's time.
    """
    await ready()
    gc.freeze()


async def _serve_http(services: Services, listener: Listener, server: CancelScope) -> None:
    """In a task of its own, as Hypercorn leaves one that asyncio takes for cancelled."""
    activity = Activity()
    app = _without_lifespan(create_app(services, listener.keys, activity))

    async def is_at_rest() -> None:
        await services.stopping.wait()
        await _come_to_rest(services, activity)
        server.deadline = anyio.current_time() + 2 * _CLOSE_S

    # What Hypercorn raises when it is cancelled while it waits for connections.
    with suppress(InvalidStateError):
        await hypercorn_serve(app, _http_config(listener), shutdown_trigger=is_at_rest)  # type: ignore[arg-type]
    server.cancel()


async def _tell_stats(services: Services) -> None:
    """Every second, whether somebody watches or not: who comes sees the last minutes."""
    before = services.engine.statistics()
    while True:
        await anyio.sleep(_STATS_S)
        now = services.engine.statistics()
        services.feed.tick(stats_after(before, now, time.time()))
        before = now


async def _come_to_rest(services: Services, activity: Activity) -> None:
    """Let requests end, then end them."""
    services.requests.close()
    services.feed.announce_shutdown()
    num, timeout_s = services.requests.num_live, services.config.shutdown_timeout_s
    logger.info("leaving; requests on their way: %d, for %g s at most, or until a second signal", num, timeout_s)
    with anyio.move_on_after(timeout_s):
        await _wait_idle(services, activity)
    services.requests.cancel_all()
    with anyio.move_on_after(_CLOSE_S):
        await _wait_idle(services, activity)


async def _wait_idle(services: Services, activity: Activity) -> None:
    await services.requests.wait_idle()
    # Those who watch have seen the end of all.
    services.feed.close()
    await activity.wait_idle()


def _without_lifespan(app: ASGIApp) -> ASGIApp:
    """The app, not told of the server's start and end: a server that is cancelled can't tell them in order."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)

    return wrapped


async def _watch_signals(services: Services, server: CancelScope) -> None:
    """The first signal lets requests end, the second ends them, the third ends all."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        await anext(signals)
        services.stopping.set()
        await anext(signals)
        services.requests.cancel_all()
        await anext(signals)
        server.cancel()


def _http_config(listener: Listener) -> Config:
    http = Config()
    # Hypercorn closes the socket.
    http.bind = [f"fd://{listener.socket.detach()}"]
    http.certfile, http.keyfile = listener.config.ssl_certfile, listener.config.ssl_keyfile
    http.backlog = 2048
    http.keep_alive_timeout = 75
    # It would end HTTP/2 connections that work.
    http.keep_alive_max_requests = 10**9
    # It would end clients that only listen.
    http.read_timeout = None
    http.h2_max_concurrent_streams = 1000
    http.include_server_header = False
    http.graceful_timeout = _CLOSE_S
    http.accesslog = None
    http.errorlog = logging.getLogger("hypercorn")
    return http
