"""News on its way to one who watches, who may be slow."""

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import anyio

from sgld.server.previews import LivePreview
from sgld.server.sse import encode_event
from sgld.server.status import State

EventName = Literal[
    "request.queued",
    "request.started",
    "request.progress",
    "request.preview",
    "request.completed",
    "request.failed",
    "request.cancelled",
    "server.stats",
    "server.shutdown",
]
EVENT_NAMES: frozenset[EventName] = frozenset(get_args(EventName))
ENDS: dict[State, EventName] = {
    "completed": "request.completed",
    "failed": "request.failed",
    "cancelled": "request.cancelled",
}
# Who is further behind is told all anew.
MAX_UNREAD = 4096


@dataclass(frozen=True)
class News:
    """One event for watchers; None as owner is for all of them. Without a number it isn't sent again."""

    name: EventName
    owner: str | None
    request_id: str | None
    data: Any
    number: int | None = None
    epoch: str = ""

    @cached_property
    def encoded(self) -> bytes:
        """It in a stream, encoded once for all who watch."""
        event_id = None if self.number is None else f"{self.epoch}-{self.number}"
        return encode_event(self.name, self.data, event_id=event_id)

    @property
    def key(self) -> object:
        """What it outdates in a mailbox: a status all that was said of its request, but not its beginning."""
        if isinstance(self.data, LivePreview):
            return self.name, self.request_id, self.data.output_index
        is_beginning = self.name in ("request.queued", "request.started")
        return (self.name if is_beginning or self.request_id is None else "", self.request_id)


class Watcher:
    """One who reads the feed, or one request of it."""

    def __init__(self, owner: str, request_id: str | None, names: frozenset[EventName]) -> None:
        self.owner = owner
        self.request_id = request_id
        self.names = names
        self.num_lost = 0
        self._has_lost = False
        self._news: OrderedDict[object, News] = OrderedDict()
        self._has_news = anyio.Event()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._news)

    def put(self, news: News) -> None:
        """Add news, if it is for this watcher; what it outdates goes."""
        if news.name not in self.names or news.owner not in (None, self.owner):
            return
        if self.request_id is not None and news.request_id not in (None, self.request_id):
            return
        if news.name in ENDS.values():
            for index in range(len(news.data.outputs)):
                self._news.pop(("request.preview", news.request_id, index), None)
        self._news.pop(news.key, None)
        self._news[news.key] = news
        if len(self._news) > MAX_UNREAD:
            self._has_lost = True
            self.num_lost += len(self._news)
            self._news.clear()
        self._has_news.set()

    def close(self) -> None:
        """Let it take what is there, and then stop."""
        self._is_closed = True
        self._has_news.set()

    def begin_anew(self) -> None:
        """Forget what is unread: the reader is about to be told all."""
        self._has_lost = False
        self._news.clear()

    def take(self) -> list[News]:
        """All that is there now."""
        news, self._news = list(self._news.values()), OrderedDict()
        return news

    async def next(self) -> News | Literal["lost", "closed"]:
        """What comes next; after "lost" the reader needs a snapshot. No deadline: the feed is closed."""
        while not self._news and not self._is_closed and not self._has_lost:
            self._has_news = anyio.Event()
            await self._has_news.wait()
        if self._has_lost:
            return "lost"
        return self._news.popitem(last=False)[1] if self._news else "closed"
