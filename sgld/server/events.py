"""/v1/events and /v1/requests: what happens to all requests of a key, told as it happens.

Streams here have ids: a client that comes back says which event it saw last, and gets those after it, or, where they
aren't kept any more or the server is another one, a snapshot. Clients of OpenAI never see these streams.
"""

from collections.abc import AsyncGenerator, Iterable, Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sgld import __version__
from sgld.errors import InvalidRequest
from sgld.server.auth import owner_of
from sgld.server.errors import json_response, not_found, shutting_down
from sgld.server.feed import Feed
from sgld.server.limits import number_in
from sgld.server.previews import MEDIA_TYPE
from sgld.server.services import Services, services_of
from sgld.server.sse import EventStream, encode_event
from sgld.server.stats import Sample, sample_of
from sgld.server.status import RequestStatus
from sgld.server.watcher import EVENT_NAMES, EventName, News, Watcher

_RETRY = b"retry: 2000\n"
# A message of many requests is sent in pieces: some proxies and clients have limits.
_PIECE_BYTES = 48 * 1024
# Of those that are over, a snapshot shows so many.
_NUM_ENDED = 100
_DEFAULT_LIMIT, _MAX_LIMIT = 100, 1000


class ServerCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a dashboard says of the server."""

    model: str
    is_ready: bool
    version: str
    device: str | None
    inputs: tuple[str, ...] | None
    """Which of `image` and `mask_image` its model takes; null while it isn't loaded."""
    fps: float | None
    """Frames per second of its model's videos, where the author recommends them; null of a model of pictures."""
    max_batch_size: int
    max_running_requests: int


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known, in `num_parts` events; the first one says that what was known before is outdated."""

    part: int
    num_parts: int
    requests: Sequence[msgspec.Raw]
    """Each a `RequestStatus`."""
    server: ServerCard | None = None
    stats: Sequence[Sample] = ()
    """Of the last minutes: time, queued, running, batch size, steps per second, part of the time that was used."""


class RequestList(msgspec.Struct, frozen=True, kw_only=True):
    """Requests, the newest first."""

    object: str = "list"
    data: Sequence[RequestStatus]
    has_more: bool


class Deleted(msgspec.Struct, frozen=True, kw_only=True):
    """What was deleted."""

    id: str
    object: str
    deleted: bool = True


async def events(request: Request) -> Response:
    """GET /v1/events?types=..&request_id=..: what happens to requests of this key, and how the server does."""
    request_id = request.query_params.get("request_id")
    return _stream(request, request_id, _names(request.query_params.get("types")))


async def request_events(request: Request) -> Response:
    """GET /v1/requests/{id}/events: what happens to one request, until it is over."""
    services, status = services_of(request), _status(request)
    number = _number(services.feed, request.headers.get("last-event-id"))
    missed = None if number is None else services.feed.since(number)
    if status.has_ended and missed is not None and not any(news.request_id == status.id for news in missed):
        # A browser that has heard all comes back until it gets this.
        return Response(status_code=204)
    return _stream(request, status.id, EVENT_NAMES - {"server.stats"}, ends_with_request=True)


async def list_requests(request: Request) -> Response:
    """GET /v1/requests?limit=..&status=..: requests on their way or not long over, the newest first."""
    query = request.query_params
    limit = query.get("limit", str(_DEFAULT_LIMIT))
    if not (num := number_in(limit, _MAX_LIMIT + 1)):
        raise InvalidRequest(f"limit is {limit[:20]!r}; it must be a number from 1 to {_MAX_LIMIT}", "limit")
    wanted = query.get("status")
    if wanted not in (None, "queued", "running", "completed", "failed", "cancelled"):
        message = f"status is {wanted[:20]!r}; it must be queued, running, completed, failed or cancelled"
        raise InvalidRequest(message, "status")
    known = services_of(request).feed.all(owner_of(request))
    found = [status for status in known if wanted in (None, status.status)]
    newest = sorted(found, key=lambda status: status.created_at, reverse=True)
    return json_response(RequestList(data=newest[:num], has_more=len(found) > num))


async def get_request(request: Request) -> Response:
    """GET /v1/requests/{id}."""
    return json_response(_status(request))


async def delete_request(request: Request) -> Response:
    """DELETE /v1/requests/{id}: ends it; one that is over isn't listed any more, but its files stay."""
    services, status = services_of(request), _status(request)
    owner = owner_of(request)
    if (live := services.requests.get(status.id, owner)) is not None:
        # A job would run again with the next server.
        if (job := await services.jobs.get(live.id, live.kind, owner)) is not None:
            await services.jobs.cancel(job)
        live.cancel()
    else:
        services.feed.forget(status.id)
    return json_response(Deleted(id=status.id, object="request.deleted"))


async def get_preview(request: Request) -> Response:
    """GET /v1/requests/{id}/preview?output=..: the latest preview of an output that isn't finished."""
    status, output = _status(request), request.query_params.get("output", "0")
    index = number_in(output, len(status.outputs))
    feed = services_of(request).feed
    if index is None or (preview := feed.preview(status.id, owner_of(request), index)) is None:
        raise not_found(f"preview of output {output[:20]} of {status.id} now")
    return Response(await preview.content(), media_type=MEDIA_TYPE, headers={"cache-control": "no-store"})


def _status(request: Request) -> RequestStatus:
    request_id = request.path_params["id"]
    status = services_of(request).feed.get(request_id, owner_of(request))
    if status is None:
        raise not_found(f"request {request_id[:80]!r} on its way, or not long over")
    return status


def _names(types: str | None) -> frozenset[EventName]:
    if types is None:
        return EVENT_NAMES
    wanted = {name for name in types.split(",") if name}
    if unknown := sorted(wanted - EVENT_NAMES):
        raise InvalidRequest(
            f"there is no event {unknown[0][:40]!r}; there are {', '.join(sorted(EVENT_NAMES))}", "types"
        )
    # Whoever listens must hear why it ends.
    return frozenset(name for name in EVENT_NAMES if name in wanted or name == "server.shutdown")


def _stream(
    request: Request, request_id: str | None, names: frozenset[EventName], *, ends_with_request: bool = False
) -> EventStream:
    services, owner = services_of(request), owner_of(request)
    if services.stopping.is_set():
        raise shutting_down()
    reader = _Reader(services, owner, request_id, names)
    events = reader.read(request.headers.get("last-event-id"), ends_with_request)
    return EventStream(events, heartbeat_s=services.config.heartbeat_s)


def _number(feed: Feed, last_id: str | None) -> int | None:
    """That of the event with this id; None where it isn't one of this server's."""
    epoch, _, text = (last_id or "").partition("-")
    return number_in(text, feed.number + 1) if epoch == feed.epoch else None


class _Reader:
    """One stream."""

    def __init__(self, services: Services, owner: str, request_id: str | None, names: frozenset[EventName]) -> None:
        self._services = services
        self._feed = services.feed
        self._owner = owner
        self._request_id = request_id
        self._names = names

    async def read(self, last_id: str | None, ends_with_request: bool) -> AsyncGenerator[bytes, None]:
        """The bytes of the stream."""
        with self._feed.watch(self._owner, request_id=self._request_id, names=self._names) as watcher:
            for piece in self._beginning(watcher, last_id):
                yield piece
            if ends_with_request and self._has_ended():
                watcher.close()
            while (chunk := await watcher.next()) != "closed":
                if chunk == "lost":
                    self._feed.num_lost += 1
                    for piece in self._snapshot(watcher):
                        yield piece
                    if ends_with_request and self._has_ended():
                        watcher.close()
                    continue
                yield await chunk.encoded()
                if ends_with_request and any(_is_end(news) for news in chunk.news):
                    return

    def _has_ended(self) -> bool:
        status = self._feed.get(self._request_id or "", self._owner)
        return status is None or status.has_ended

    def _beginning(self, watcher: Watcher, last_id: str | None) -> list[bytes]:
        """All of it at once, so that nothing happens in between."""
        number = _number(self._feed, last_id)
        if number is None or self._feed.since(number) is None:
            return [_RETRY, *self._snapshot(watcher)]
        watcher.number = number
        return [_RETRY + b"\n"]

    def _snapshot(self, watcher: Watcher) -> list[bytes]:
        watcher.begin_anew()
        known = [status for status in self._feed.all(self._owner) if self._request_id in (None, status.id)]
        ended = [status for status in known if status.has_ended][-_NUM_ENDED:]
        pieces = _pieces([*ended, *(status for status in known if not status.has_ended)])
        events = [Snapshot(part=i, num_parts=len(pieces), requests=piece) for i, piece in enumerate(pieces)]
        if "server.stats" in self._names:
            history = tuple(sample_of(stats) for stats in self._feed.stats)
            events[0] = msgspec.structs.replace(events[0], server=_card(self._services), stats=history)
        # The id belongs to all of it, so the last piece has it.
        ids = [None] * (len(events) - 1) + [self._id(self._feed.number)]
        return [encode_event("snapshot", event, event_id=i) for event, i in zip(events, ids, strict=True)]

    def _id(self, number: int) -> str:
        return f"{self._feed.epoch}-{number}"


def _is_end(news: News) -> bool:
    return isinstance(news.data, RequestStatus) and news.data.has_ended


def _pieces(statuses: Iterable[RequestStatus]) -> list[list[msgspec.Raw]]:
    """Statuses as JSON, in parts that aren't too large; one part at least."""
    pieces: list[list[msgspec.Raw]] = [[]]
    size = 0
    for status in statuses:
        encoded = msgspec.json.encode(status)
        if size + len(encoded) > _PIECE_BYTES and pieces[-1]:
            pieces.append([])
            size = 0
        pieces[-1].append(msgspec.Raw(encoded))
        size += len(encoded)
    return pieces


def _card(services: Services) -> ServerCard:
    model = services.engine.model
    return ServerCard(
        model=services.model_name,
        is_ready=model is not None,
        version=__version__,
        device=(model.device_name or model.device) if model else None,
        inputs=model.inputs if model else None,
        fps=model.fps if model else None,
        max_batch_size=services.engine_config.max_batch_size,
        max_running_requests=services.engine_config.max_running_requests * services.engine_config.parallel.dp_size,
    )
