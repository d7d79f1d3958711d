"""Requests on their way to their task: they may have to wait for adapters and filters, while others go on."""

import functools
from collections.abc import Callable, Mapping

from sgld.errors import InvalidRequest
from sgld.messages import Start
from sgld.models.filters import Filter
from sgld.outcome import Raised, outcome_of
from sgld.worker.adapters import Adapters, Loaded, source_of
from sgld.worker.filters import Filters
from sgld.worker.slots import Applied


class Admission:
    """Starts requests once what they need is there, in the order in which they came as far as that goes.

    :param start: gets a request with what changes the components for it, and its filters.
    :param failed: told of one that can't be started.
    """

    def __init__(
        self,
        adapters: Adapters,
        filters: Filters,
        start: Callable[[Start, Mapping[str, Applied], tuple[Filter, ...]], None],
        failed: Callable[[str, BaseException], None],
    ) -> None:
        self._adapters = adapters
        self._filters = filters
        self._start = start
        self._failed = failed
        self._waiting: dict[str, Start] = {}

    def add(self, asked: Start) -> None:
        """Take a request; `look` starts it."""
        self._waiting[asked.request_id] = asked

    def cancel(self, request_id: str) -> bool:
        """Forget a request that waits; false if it doesn't."""
        return self._waiting.pop(request_id, None) is not None

    def look(self, *, can_install: Callable[[], bool]) -> list[Loaded]:
        """Start all that can be started.

        :param can_install: components may be changed now; one that is started may put an end to that.
        :return: the adapters that were read meanwhile.
        """
        read = self._adapters.collect()
        problems = {loaded.source: loaded.result for loaded in read if isinstance(loaded.result, InvalidRequest)}
        for request_id, asked in list(self._waiting.items()):
            own = [problems[source] for choice in asked.params.lora or () if (source := source_of(choice)) in problems]
            if own:
                self._end(request_id, own[0])
            else:
                self._try(asked, can_install())
        if read:
            self._adapters.trim(source_of(c) for asked in self._waiting.values() for c in asked.params.lora or ())
        return read

    def _try(self, asked: Start, can_install: bool) -> None:
        # What it can't begin with fails it alone.
        ready = outcome_of(functools.partial(self._ready, asked, can_install))
        if isinstance(ready, Raised):
            self._end(asked.request_id, ready.error)
        elif ready.value is not None:
            del self._waiting[asked.request_id]
            self._start(asked, *ready.value)

    def _ready(self, asked: Start, can_install: bool) -> tuple[Mapping[str, Applied], tuple[Filter, ...]] | None:
        """The adapters and filters of a request; None while one isn't there."""
        filters = self._filters.of(asked.params)
        if filters is None:
            return None
        applied = self._adapters.use(asked.request_id, asked.params.lora or (), can_install=can_install)
        return None if applied is None else (applied, filters)

    def _end(self, request_id: str, error: BaseException) -> None:
        del self._waiting[request_id]
        self._failed(request_id, error)
