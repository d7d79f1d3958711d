"""What happens to all requests, for those who watch: a status of each, and a stream of events with numbers.

Whoever publishes never waits. News of a request replaces what is outdated by it, so that what there is to read is
bounded by the number of requests; a watcher that is further behind than that begins anew with a snapshot.
"""

import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio

from sgld.events import AnyEvent, Frames, Preview, Queued, Started, Terminal
from sgld.server.job_store import Job
from sgld.server.previews import LivePreview
from sgld.server.requests import LiveRequest
from sgld.server.stats import ServerStats
from sgld.server.status import RequestStatus, after, moved, new_status, of_job, progress_of
from sgld.server.watcher import ENDS, EVENT_NAMES, Board, EventName, News, Watcher

HIDDEN_KINDS = frozenset({"health"})
# Requests that a client may look back to.
MAX_ENDED = 500
_MAX_STATS = 300
# What comes meanwhile is one chunk. For each who watches, so that with many the event loop has time for others, too.
_PAUSE_S = 5e-5


class Feed:
    """The status of all requests, and who watches them.

    :param clock: seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.epoch = secrets.token_hex(4)
        """Numbers of events mean nothing to another server."""
        self.num_lost = 0
        """How often one who watched was too far behind."""
        self.stats: deque[ServerStats] = deque(maxlen=_MAX_STATS)
        self._clock = clock
        self._board = Board()
        self._live: dict[str, tuple[str, RequestStatus]] = {}
        self._ended: OrderedDict[str, tuple[str, RequestStatus]] = OrderedDict()
        self._queue: list[tuple[str, int]] = []
        """Outputs that wait, as the engine ordered them when they came."""
        self._previews: dict[str, dict[int, LivePreview]] = {}
        self._watchers: set[Watcher] = set()
        self._is_closed = False

    def observe(self, live: LiveRequest, event: AnyEvent) -> None:
        """Take notice of an event of a request; what nobody asked for, as probes of its health, isn't shown."""
        self._keep_place(live.id, event)
        if live.kind in HIDDEN_KINDS or isinstance(event, Frames):
            return
        now = self._clock()
        known = self._live.get(live.id)
        before = known[1] if known else new_status(live.id, live.kind, live.params, now)
        if isinstance(event, Preview):
            preview = LivePreview(event.image, event.step, event.output_index)
            self._previews.setdefault(live.id, {})[event.output_index] = preview
            self._put("request.preview", live.owner, live.id, preview)
            return
        status = after(before, event, now)
        self._live[live.id] = live.owner, status
        if status.has_ended:
            self._end(live.owner, status)
        name = _name_of(before if known else None, status)
        self._put(name, live.owner, live.id, progress_of(status) if name == "request.progress" else status)

    def recall(self, jobs: Iterable[Job]) -> None:
        """Begin with what an earlier server finished."""
        for job in jobs:
            self._ended[job.id] = job.owner, of_job(job)

    def tick(self, stats: ServerStats) -> None:
        """Tell how the server does, and who has moved up in the queue."""
        self.stats.append(stats)
        self._put("server.stats", None, None, stats)
        for position, (request_id, index) in enumerate(self._queue):
            owner, status = self._live.get(request_id, (None, None))
            if status is None or status.outputs[index].position == position:
                continue
            assert owner is not None
            self._live[request_id] = owner, moved(status, index, position)
            self._put("request.progress", owner, request_id, progress_of(self._live[request_id][1]))

    def announce_shutdown(self) -> None:
        """Tell everybody that the server is about to leave."""
        self._put("server.shutdown", None, None, {})

    async def run(self) -> None:
        """Tell those who watch what is new, as long as it isn't cancelled."""
        while True:
            await self._board.changed()
            self._board.tell()
            await anyio.sleep(_PAUSE_S * len(self._watchers))

    def close(self) -> None:
        """End all streams, once they have taken what is there."""
        self._is_closed = True
        for watcher in self._watchers:
            watcher.close()
        self._board.tell()

    @contextmanager
    def watch(
        self, owner: str, *, request_id: str | None = None, names: frozenset[EventName] = EVENT_NAMES
    ) -> Iterator[Watcher]:
        """News from now on, of one request or of all of an owner."""
        watcher = Watcher(self._board, owner, request_id, names)
        if self._is_closed:
            watcher.close()
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    @property
    def number(self) -> int:
        """That of the last event."""
        return self._board.number

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    def since(self, number: int) -> list[News] | None:
        """The news after this one that isn't outdated; None where some of it isn't kept any more."""
        return self._board.since(number) if self._board.has_all_since(number) else None

    def get(self, request_id: str, owner: str) -> RequestStatus | None:
        """A request, if it is the owner's and on its way or not long over."""
        found = self._live.get(request_id) or self._ended.get(request_id)
        return found[1] if found is not None and found[0] == owner else None

    def all(self, owner: str) -> list[RequestStatus]:
        """The owner's requests, those that are over first, as they came to their end; then the others, as they came."""
        known = [*self._ended.values(), *self._live.values()]
        return [status for whose, status in known if whose == owner]

    def forget(self, request_id: str) -> None:
        """Show a request that is over no more."""
        self._ended.pop(request_id, None)

    def preview(self, request_id: str, owner: str, output_index: int) -> LivePreview | None:
        """The latest preview of an output that isn't finished."""
        whose, _ = self._live.get(request_id, (None, None))
        return self._previews.get(request_id, {}).get(output_index) if whose == owner else None

    def _end(self, owner: str, status: RequestStatus) -> None:
        del self._live[status.id]
        self._previews.pop(status.id, None)
        self._ended[status.id] = owner, status
        while len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)

    def _keep_place(self, request_id: str, event: AnyEvent) -> None:
        """Follow the queue: who is taken out lets those behind move up."""
        place = (request_id, event.output_index)
        if isinstance(event, Queued):
            self._queue.insert(event.position, place)
        elif isinstance(event, Started | Terminal) and place in self._queue:
            self._queue.remove(place)

    def _put(self, name: EventName, owner: str | None, request_id: str | None, data: Any) -> None:
        self._board.put(News(name, owner, request_id, data, self._board.number + 1, self.epoch))


def _name_of(before: RequestStatus | None, status: RequestStatus) -> EventName:
    if status.has_ended:
        return ENDS[status.status]
    if before is not None and before.status == status.status:
        return "request.progress"
    return "request.started" if status.status == "running" else "request.queued"
