"""News, and those who watch it, each at a pace of their own."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import anyio

from sgld.server.previews import LivePreview, preview_event
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
MAX_NEWS = 4096


@dataclass(frozen=True)
class News:
    """One event for watchers; None as owner is for all of them."""

    name: EventName
    owner: str | None
    request_id: str | None
    data: Any
    number: int
    epoch: str

    @property
    def key(self) -> object:
        """What it outdates: a status all that was said of its request, but not its beginning."""
        if isinstance(self.data, LivePreview):
            return self.name, self.request_id, self.data.output_index
        is_beginning = self.name in ("request.queued", "request.started")
        return (self.name if is_beginning or self.request_id is None else "", self.request_id)

    async def encoded(self) -> bytes:
        """It in a stream."""
        data = self.data
        if isinstance(data, LivePreview):
            assert self.request_id is not None
            data = await preview_event(self.request_id, data)
        return encode_event(self.name, data, event_id=f"{self.epoch}-{self.number}")


class Chunk:
    """What several are told at once, encoded once for all of them."""

    def __init__(self, news: Sequence[News]) -> None:
        self.news = news
        self._lock = anyio.Lock()
        self._encoded: bytes | None = None

    async def encoded(self) -> bytes:
        """It in a stream."""
        if self._encoded is None:
            async with self._lock:
                if self._encoded is None:
                    self._encoded = b"".join([await news.encoded() for news in self.news])
        return self._encoded


class Board:
    """The latest news, in order; what news outdates goes.

    Putting news costs the same for one who watches and for many. They read on from the number that they have read last,
    up to what was told, so that those who are up to date read the same chunks.
    """

    def __init__(self) -> None:
        self.number = 0
        """That of the last news."""
        self.told = 0
        """That of the last news of which those who wait were told."""
        self._lost = 0
        self._news: OrderedDict[object, News] = OrderedDict()
        self._chunks: dict[object, Chunk] = {}
        self._has_news = anyio.Event()
        self._is_told = anyio.Event()

    def put(self, news: News) -> None:
        """Add news, whose number is the next one."""
        self.number = news.number
        if news.name in ENDS.values():
            for index in range(len(news.data.outputs)):
                self._news.pop(("request.preview", news.request_id, index), None)
        self._news.pop(news.key, None)
        self._news[news.key] = news
        if len(self._news) > MAX_NEWS:
            self._lost = self._news.popitem(last=False)[1].number
        self._has_news.set()

    def has_all_since(self, number: int) -> bool:
        """Whether nothing after this number is missing that isn't outdated."""
        return self._lost <= number <= self.number

    def since(self, number: int) -> list[News]:
        """The news after this number."""
        found: list[News] = []
        for news in reversed(self._news.values()):
            if news.number <= number:
                break
            found.append(news)
        return found[::-1]

    def chunk(self, watcher: "Watcher", until: int) -> Chunk:
        """What is new to one who watches, the same for all to whom the same is new."""
        key = (watcher.number, until, watcher.owner, watcher.request_id, watcher.names)
        if (chunk := self._chunks.get(key)) is None:
            news = [news for news in self.since(watcher.number) if news.number <= until and watcher.wants(news)]
            self._chunks[key] = chunk = Chunk(news)
        return chunk

    async def changed(self) -> None:
        """Wait for news that wasn't told."""
        while self.told == self.number:
            self._has_news = anyio.Event()
            await self._has_news.wait()

    def tell(self) -> None:
        """Let those who wait read on."""
        self.told = self.number
        self._chunks.clear()
        self._is_told.set()
        self._is_told = anyio.Event()

    async def wait_told(self) -> None:
        """Wait until there may be more to read. No deadline: a feed is closed."""
        await self._is_told.wait()


class Watcher:
    """One who reads the feed, or one request of it; `number` is that of the last news that was read."""

    def __init__(self, board: Board, owner: str, request_id: str | None, names: frozenset[EventName]) -> None:
        self.owner = owner
        self.request_id = request_id
        self.names = names
        self.number = board.number
        self._board = board
        self._is_closed = False

    def wants(self, news: News) -> bool:
        """Whether news is for this one."""
        is_about = self.request_id is None or news.request_id in (None, self.request_id)
        return is_about and news.name in self.names and news.owner in (None, self.owner)

    def close(self) -> None:
        """Let it take what is there, and then stop."""
        self._is_closed = True

    def begin_anew(self) -> None:
        """Forget what is unread: the reader is about to be told all."""
        self.number = self._board.number

    async def next(self) -> Chunk | Literal["lost", "closed"]:
        """What comes next; after "lost" the reader needs a snapshot."""
        while True:
            if not self._board.has_all_since(self.number):
                return "lost"
            until = self._board.number if self._is_closed else self._board.told
            if until > self.number:
                chunk = self._board.chunk(self, until)
                self.number = until
                if chunk.news:
                    return chunk
            if self._is_closed:
                return "closed"
            await self._board.wait_told()
