"""The requests that are on their way: run in the server's task group, watched by any number of readers."""

import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from types import TracebackType
from typing import Protocol, Self

import anyio
import msgspec
from anyio.abc import TaskGroup

from sgld.engine.adapters import EngineLoras
from sgld.engine.statistics import Statistics
from sgld.errors import EngineClosed, SgldError
from sgld.events import (
    AnyEvent,
    Cancelled,
    Completed,
    Event,
    Failed,
    Frames,
    Preview,
    Progress,
    Terminal,
)
from sgld.media.inputs import InputPolicy
from sgld.messages import ModelInfo
from sgld.outcome import on_failure
from sgld.request import NO_LIMITS, Limits
from sgld.sampling_params import SamplingParams
from sgld.server.subscription import Subscription

logger = logging.getLogger(__name__)
STORAGE_FAILED = "storage_failed"
INTERNAL_ERROR = "internal_error"
_BUG = "the server failed; its log says more"


class Generates(Protocol):
    """What the server needs of an engine."""

    @property
    def model(self) -> ModelInfo | None:
        """The model, while it is served; None before, and while its rank is lost."""

    @property
    def loras(self) -> EngineLoras:
        """LoRA adapters: those that have names, and those that requests get."""

    def generate(
        self, params: SamplingParams, *, inputs: InputPolicy, waited_s: float = 0.0, limits: Limits = NO_LIMITS
    ) -> AsyncGenerator[AnyEvent, None]:
        """Stream the events of all outputs of a request, which was accepted `waited_s` ago by an earlier server."""

    def statistics(self) -> Statistics:
        """What it has done and knows."""


class LiveRequest:
    """A request on its way, and what somebody who comes late must hear of it.

    :param finish: called with each output before its `Completed` is told, to encode and store it. An SgldError or
        OSError of it makes the output a failed one.
    :param waited_s: how long ago an earlier server accepted it.
    :param limits: how much may come out of it.
    """

    def __init__(
        self,
        request_id: str,
        kind: str,
        owner: str,
        params: SamplingParams,
        finish: "Finish",
        *,
        waited_s: float = 0.0,
        limits: Limits = NO_LIMITS,
    ) -> None:
        self.id = request_id
        self.kind = kind
        self.owner = owner
        self.params = params
        self.created_at = int(time.time())
        self.observers: Sequence[Observer] = ()
        self.epoch = secrets.token_hex(4)
        """What numbers of its events are worth anything with: a job that runs again has others."""
        self._finish = finish
        self._waited_s, self._limits = waited_s, limits
        self._scope = anyio.CancelScope()
        self._open = set(range(params.num_outputs_per_prompt))
        self._history: list[tuple[int, AnyEvent]] = []
        self._num_events = 0
        self._subscriptions: set[Subscription] = set()
        self._is_decided = anyio.Event()
        self._refusal: Exception | None = None

    @property
    def is_done(self) -> bool:
        return not self._open

    def cancel(self) -> None:
        """End what still runs; at the next call of its pipeline."""
        self._scope.cancel()

    @contextmanager
    def subscribe(self, *, ignores: tuple[type[Event], ...] = (), after: int = 0) -> Iterator[Subscription]:
        """Its events: those that still matter of the past, from a number on, then all that come."""
        subscription = Subscription(ignores)
        for number, event in self._history:
            if number > after:
                subscription.put(event, number)
        self._subscriptions.add(subscription)
        if self.is_done:
            subscription.close()
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    async def admitted(self) -> None:
        """Wait until the engine has queued it.

        :raises SgldError: it was refused.
        """
        await self._is_decided.wait()
        if self._refusal is not None:
            raise self._refusal

    async def run(self, engine: Generates, inputs: InputPolicy) -> None:
        """Run it to its end, whatever that is."""
        try:
            with self._scope:
                async with anyio.create_task_group() as finishing:
                    await self._relay(engine, inputs, finishing)
        finally:
            for index in sorted(self._open):
                self._publish(Cancelled(request_id=self.id, output_index=index))
            self._decide(EngineClosed("the request was cancelled"))

    async def _relay(self, engine: Generates, inputs: InputPolicy, finishing: TaskGroup) -> None:
        stream = engine.generate(self.params, inputs=inputs, waited_s=self._waited_s, limits=self._limits)
        with _failing(f"request {self.id}", self._fail):
            async with aclosing(stream) as events:
                async for event in events:
                    self._decide(None)
                    if isinstance(event, Completed):
                        finishing.start_soon(self._complete, event)
                    else:
                        self._publish(event)

    async def _complete(self, event: Completed) -> None:
        def failed(error: Exception, code: str) -> None:
            self._fail_output(event.output_index, code, str(error))

        with _failing(f"request {self.id}, output {event.output_index}", failed):
            try:
                await self._finish(self, event)
            except OSError as error:
                logger.error("request %s: the result can't be stored: %s", self.id, error)
                # Where the file would be concerns nobody else.
                failed(OSError(f"the result can't be stored: {error.strerror or error}"), STORAGE_FAILED)
            else:
                self._publish(event)

    def _fail(self, error: Exception, code: str) -> None:
        if self._decide(error):
            self._open.clear()
            return
        for index in sorted(self._open):
            self._fail_output(index, code, str(error))

    def _fail_output(self, index: int, code: str, message: str) -> None:
        self._publish(Failed(request_id=self.id, output_index=index, code=code, message=message))

    def _decide(self, refusal: Exception | None) -> bool:
        """Tell whoever waits that it is admitted or refused; False if that was told before."""
        if self._is_decided.is_set():
            return False
        self._refusal = refusal
        self._is_decided.set()
        return True

    def _publish(self, event: AnyEvent) -> None:
        event = msgspec.structs.replace(event, request_id=self.id)
        self._num_events += 1
        self._remember(event)
        for observe in self.observers:
            observe(self, event)
        for subscription in self._subscriptions:
            subscription.put(event, self._num_events)
        if isinstance(event, Terminal):
            self._open.discard(event.output_index)
            if self.is_done:
                for subscription in self._subscriptions:
                    subscription.close()

    def _remember(self, event: AnyEvent) -> None:
        """Keep what isn't outdated: frames stay until the result has them all."""
        outdated: tuple[type[Event], ...] = (type(event),) if not isinstance(event, Frames) else ()
        if isinstance(event, Terminal):
            outdated = (Progress, Preview, Frames)
        mine = event.output_index
        self._history = [(n, e) for n, e in self._history if e.output_index != mine or not isinstance(e, outdated)]
        self._history.append((self._num_events, event))


Finish = Callable[[LiveRequest, Completed], Awaitable[None]]
Observer = Callable[[LiveRequest, AnyEvent], None]
"""Hears each event of each request, without waiting."""


def new_id(kind: str) -> str:
    """The id of a new request."""
    return f"{kind}_{secrets.token_hex(16)}"


class Requests:
    """All requests that are on their way: `async with Requests(engine, inputs) as requests`.

    :param inputs: where the pictures that params refer to may come from; what clients may say is checked before.
    :param limits: how much may come out of each.
    """

    def __init__(self, engine: Generates, inputs: InputPolicy, limits: Limits = NO_LIMITS) -> None:
        self.observers: list[Observer] = []
        self._engine = engine
        self._inputs = inputs
        self._limits = limits
        self._live: dict[str, LiveRequest] = {}
        self._is_open = False
        self._is_idle = anyio.Event()
        self._tasks = anyio.create_task_group()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._is_open = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        self.close()
        self.cancel_all()
        return await self._tasks.__aexit__(exc_type, exc, traceback)

    async def submit(
        self,
        params: SamplingParams,
        *,
        kind: str,
        owner: str,
        finish: Finish,
        request_id: str | None = None,
        waited_s: float = 0.0,
        limits: Limits = NO_LIMITS,
    ) -> LiveRequest:
        """Start a request and wait until it is queued; cancelled meanwhile, it is cancelled, too.

        :param kind: what its id begins with, `img` or `video`.
        :param request_id: its id, where it has one already.
        :param waited_s: how long ago an earlier server accepted it.
        :param limits: those of what is made of its outputs, beside the operator's.
        :raises SgldError: it is refused.
        """
        if not self._is_open:
            raise EngineClosed("the server is shutting down")
        limits = self._limits.also(limits)
        live = LiveRequest(request_id or new_id(kind), kind, owner, params, finish, waited_s=waited_s, limits=limits)
        live.observers = self.observers
        self._live[live.id] = live
        self._tasks.start_soon(self._run, live)
        with on_failure(live.cancel):
            await live.admitted()
        return live

    def get(self, request_id: str, owner: str) -> LiveRequest | None:
        """A request on its way, if it is the owner's."""
        live = self._live.get(request_id)
        return live if live is not None and live.owner == owner else None

    def all(self, owner: str) -> list[LiveRequest]:
        """The owner's requests on their way, in the order in which they came."""
        return [live for live in self._live.values() if live.owner == owner]

    @property
    def is_open(self) -> bool:
        """Whether it accepts requests; not when the server is about to leave."""
        return self._is_open

    @property
    def num_live(self) -> int:
        """How many are on their way, of all owners."""
        return len(self._live)

    def close(self) -> None:
        """Accept no more requests."""
        self._is_open = False

    def cancel_all(self) -> None:
        """End all requests."""
        for live in self._live.values():
            live.cancel()

    async def wait_idle(self) -> None:
        """Wait until no request is on its way."""
        while self._live:
            self._is_idle = anyio.Event()
            await self._is_idle.wait()

    async def _run(self, live: LiveRequest) -> None:
        try:
            await live.run(self._engine, self._inputs)
        finally:
            del self._live[live.id]
            if not self._live:
                self._is_idle.set()


@contextmanager
def _failing(what: str, failed: Callable[[Exception, str], None]) -> Iterator[None]:
    """The boundary of a request's tasks: a bug ends it and nothing else.

    :param failed: told the error and its code.
    """
    try:
        yield
    except SgldError as error:
        failed(error, error.code)
    except Exception:
        logger.exception("%s", what)
        failed(SgldError(_BUG), INTERNAL_ERROR)
