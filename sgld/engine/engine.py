"""The engine: requests in, events out. One event loop owns the schedulers and the handles of the ranks."""

import dataclasses
import functools
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import anyio
from anyio import to_thread

from sgld.config import EngineConfig
from sgld.engine.adapters import EngineLoras
from sgld.engine.cost import CostModel
from sgld.engine.demand import Profiles, demand_of
from sgld.engine.entry import Entry
from sgld.engine.memory import Memory
from sgld.engine.replica import RankFactory, rank_process, refuse_unguarded_spawn
from sgld.engine.replicas import Replica, place, tell_ranks
from sgld.engine.requests import Requests, check_fits, output_id
from sgld.engine.served import Served
from sgld.engine.statistics import CostStatistics, Statistics, Tally
from sgld.engine.supervisor import Supervisor
from sgld.engine.trace import open_trace
from sgld.errors import EngineClosed
from sgld.events import AnyEvent, Terminal
from sgld.media.inputs import InputPolicy, as_files
from sgld.messages import Cancel, ModelInfo
from sgld.request import NO_LIMITS, Limits, RequestState
from sgld.sampling_params import SamplingParams

_ANY_INPUT = InputPolicy()


class Engine:
    """Serves one model: `async with Engine(config) as engine: async for event in engine.generate(params)`.

    Entering it doesn't wait for the model; requests wait for it, and `ready` does.

    :param rank_factory: starts a rank; by default a process of its own.
    """

    def __init__(self, config: EngineConfig, *, rank_factory: RankFactory = rank_process) -> None:
        self._config = config
        self._cost = CostModel()
        profiles = Profiles(self._cost)
        self._memory = Memory(config, self._cost, profiles)
        self._replicas = tuple(Replica(i, config, self._cost, profiles) for i in range(config.parallel.dp_size))
        self._served = Served()
        self._is_open = False
        self._stack = AsyncExitStack()
        self._tally = Tally(None)
        self._requests = Requests([replica.scheduler for replica in self._replicas], self._tally)
        self._opened_at = time.monotonic()
        self._loras = EngineLoras(config.adapters, functools.partial(tell_ranks, self._replicas))
        self._supervisor = Supervisor(
            config=config,
            rank_factory=rank_factory,
            replicas=self._replicas,
            requests=self._requests,
            loras=self._loras,
            served=self._served,
            memory=self._memory,
            tally=self._tally,
            generate=self.generate,
        )

    async def __aenter__(self) -> Self:
        refuse_unguarded_spawn()
        self._tally.trace = await to_thread.run_sync(open_trace, self._config.trace)
        tasks = await self._stack.enter_async_context(anyio.create_task_group())
        self._stack.callback(tasks.cancel_scope.cancel)
        self._is_open = True
        self._supervisor.start(tasks)
        tasks.start_soon(self._memory.keep_forever)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_open = False
        self._requests.cancel_all()
        self._served.decide()
        await self._stack.aclose()
        with anyio.CancelScope(shield=True):
            await self._memory.keep()
            if self._tally.trace is not None:
                await to_thread.run_sync(self._tally.trace.close)

    @property
    def model(self) -> ModelInfo | None:
        """The model, while it is served; None before, and while all ranks are lost."""
        return self._served.model if self._served.is_decided and self._supervisor.has_rank else None

    @property
    def loras(self) -> EngineLoras:
        """LoRA adapters: those that have names, and those that requests get."""
        return self._loras

    async def ready(self) -> ModelInfo:
        """Wait until the model is loaded.

        :raises ModelError: it can't be.
        :raises EngineClosed: the engine was closed before.
        """
        return await self._served.wait()

    def statistics(self) -> Statistics:
        """What the engine has done and knows."""
        ended = self._tally.num_ended
        return Statistics(
            uptime_s=time.monotonic() - self._opened_at,
            num_queued=self._requests.num_in(RequestState.QUEUED),
            num_running=self._requests.num_in(RequestState.RUNNING),
            num_completed=ended[RequestState.COMPLETED],
            num_failed=ended[RequestState.FAILED],
            num_cancelled=ended[RequestState.CANCELLED],
            num_restarts=self._tally.num_restarts,
            num_skipped_calls=self._tally.num_skipped_calls,
            calls=self._tally.calls,
            merging=dict(self._tally.merging),
            costs=tuple(
                CostStatistics(key=k, num_rows=n, variant=v, elapsed_s=s) for k, n, v, s in self._cost.current()
            ),
            etas=self._tally.etas.statistics,
            replicas=tuple(each.statistics(self._requests, self._loras.held(each.index)) for each in self._replicas),
        )

    def record(self, event: AnyEvent, label: str, start_s: float, end_s: float) -> None:
        """Show in the trace what was done with an event, as writing a file; on the clock of `time.monotonic`."""
        if self._tally.trace is not None:
            self._tally.trace.span(output_id(event.request_id, event.output_index), label, start_s, end_s)

    async def generate(
        self,
        params: SamplingParams,
        *,
        inputs: InputPolicy = _ANY_INPUT,
        waited_s: float = 0.0,
        limits: Limits = NO_LIMITS,
    ) -> AsyncGenerator[AnyEvent, None]:
        """Run one request and stream its events; each of its outputs ends with an event of its own.

        Leaving the iteration early cancels what still runs.

        :param inputs: where the pictures that the params refer to may come from.
        :param waited_s: since it was accepted, with an earlier engine: its deadline counts from there, and doesn't
            refuse it any more.
        :param limits: how much may come out of it; one that makes more fails, if it is only seen then.
        :raises InvalidRequest: the params are too large, hold what JSON doesn't have, a picture can't be had, or no
            adapter has such a nickname.
        :raises QueueFull: too many requests wait.
        :raises DeadlineImpossible: it takes longer than its deadline allows, even alone.
        :raises EngineClosed: the engine isn't open.
        :raises ModelError: the model can't be served.
        """
        self._check_open(params, waited_s)
        params = self._loras.resolved(params)
        async with as_files(params, inputs) as readable:
            entries = self._submit(readable, waited_s, limits)
            stream = entries[0].stream
            try:
                num_open = len(entries)
                while num_open:
                    event = await stream.get()
                    if event is None:
                        assert self._served.error is not None, "only a model that can't be served ends a stream early"
                        raise self._served.error
                    num_open -= isinstance(event, Terminal)
                    yield event
            finally:
                for entry in entries:
                    self._cancel(entry)

    def _check_open(self, params: SamplingParams, waited_s: float) -> None:
        """See that a request would be taken now; raises what `generate` does."""
        if not self._is_open:
            raise EngineClosed("the engine isn't open; use it in an `async with` block")
        self._served.check()
        demand = demand_of(params)
        if waited_s:
            demand = dataclasses.replace(demand, deadline_s=None)
        chosen = place(params, self._replicas, self._requests)
        beside = [replica.scheduler for replica in self._replicas if replica is not chosen]
        chosen.scheduler.check_room(demand, params.num_outputs_per_prompt, time.monotonic(), beside=beside)

    def _submit(self, params: SamplingParams, waited_s: float, limits: Limits) -> list[Entry]:
        # Again: meanwhile its pictures may have been downloaded.
        self._check_open(params, waited_s)
        check_fits(params)

        def chosen() -> int:
            return place(params, self._replicas, self._requests).index

        entries = self._requests.add(params, chosen, waited_s, limits)
        for replica in self._replicas:
            replica.tick(self._requests)
        return entries

    def _cancel(self, entry: Entry) -> None:
        """End a request that is still on its way; its task ends at its next call."""
        if entry.state.is_terminal:
            return
        replica = self._replicas[entry.replica]
        if entry.state is RequestState.RUNNING:
            replica.send(Cancel(request_id=entry.request.id))
        self._requests.cancel(entry)
        replica.tick(self._requests)
