"""Events on their way from a request to one reader."""

from collections import OrderedDict
from itertools import count
from typing import Self

import anyio

from sgld.events import AnyEvent, Event, Preview, Progress


class Subscription:
    """Events on their way to one reader; putting never waits.

    Of progress and previews only the latest of each output is kept while the reader is behind; all other events are
    kept, in order, and there are only as many as a request has to tell.

    :param ignores: kinds of events that the reader doesn't want.
    """

    def __init__(self, ignores: tuple[type[Event], ...] = ()) -> None:
        self._ignores = ignores
        self._events: OrderedDict[object, tuple[int, AnyEvent]] = OrderedDict()
        self.number = 0
        """That of the event that was read last, among those of its request."""
        self._numbers = count()
        self._has_news = anyio.Event()
        self._is_closed = False

    def put(self, event: AnyEvent, number: int = 0) -> None:
        """Add an event, in the place of one that it outdates."""
        if isinstance(event, self._ignores):
            return
        is_replaceable = isinstance(event, Progress | Preview)
        key = (event.request_id, event.output_index, type(event)) if is_replaceable else next(self._numbers)
        self._events.pop(key, None)
        self._events[key] = number, event
        self._has_news.set()

    def close(self) -> None:
        """Let the reader take what is there, and then stop."""
        self._is_closed = True
        self._has_news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AnyEvent:
        """No deadline: every request ends, and closes its subscriptions."""
        while not self._events:
            if self._is_closed:
                raise StopAsyncIteration
            self._has_news = anyio.Event()
            await self._has_news.wait()
        self.number, event = self._events.popitem(last=False)[1]
        return event
