"""The engine: requests in, events out. One event loop owns the schedulers and the handles of the ranks."""

import dataclasses
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self, assert_never

import anyio
from anyio import to_thread

from sgld.config import EngineConfig
from sgld.engine.adapters import EngineLoras
from sgld.engine.calibration import Code
from sgld.engine.cost import CostModel, at_degree
from sgld.engine.demand import Profiles, demand_of
from sgld.engine.entry import Entry
from sgld.engine.memory import Memory
from sgld.engine.replica import Rank, RankFactory, rank_process, refuse_unguarded_spawn
from sgld.engine.replicas import Replica, balance, place
from sgld.engine.requests import Requests, check_fits, output_id
from sgld.engine.served import Served
from sgld.engine.statistics import CostStatistics, Statistics, Tally
from sgld.engine.trace import open_trace
from sgld.errors import EngineClosed, RankLost
from sgld.events import AnyEvent, Terminal
from sgld.media.inputs import InputPolicy, as_files
from sgld.messages import (
    Alive,
    AnyReply,
    Cancel,
    Compiling,
    Decoded,
    Finished,
    Heard,
    Idle,
    Judged,
    Launched,
    LoadFailed,
    LoadLora,
    LoraFailed,
    LoraLoaded,
    LorasHeld,
    ModelInfo,
    Noted,
    Pending,
    Previewed,
    Ran,
    Ready,
    Stepped,
    TaskCancelled,
    TaskFailed,
    UnloadLora,
)
from sgld.request import NO_LIMITS, Limits, RequestState
from sgld.sampling_params import SamplingParams

logger = logging.getLogger(__name__)
# So many ranks in a row may be lost before they are ready, where one was ready before.
MAX_LOST_LOADS = 3
# So long at most a replica pauses before it tries again to load, while others serve.
MAX_PAUSE_S = 60
_ANY_INPUT = InputPolicy()


class Engine:
    """Serves one model: `async with Engine(config) as engine: async for event in engine.generate(params)`.

    Entering it doesn't wait for the model; requests wait for it, and `ready` does.

    :param rank_factory: starts a rank; by default a process of its own.
    """

    def __init__(self, config: EngineConfig, *, rank_factory: RankFactory = rank_process) -> None:
        self._config = config
        self._rank_factory = rank_factory
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
        self._loras = EngineLoras(config.adapters, self._tell_ranks)

    async def __aenter__(self) -> Self:
        refuse_unguarded_spawn()
        self._tally.trace = await to_thread.run_sync(open_trace, self._config.trace)
        self._tasks = tasks = await self._stack.enter_async_context(anyio.create_task_group())
        self._stack.callback(tasks.cancel_scope.cancel)
        self._is_open = True
        for replica in self._replicas:
            tasks.start_soon(self._serve, replica)
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
        return self._served.model if self._served.is_decided and self._has_rank else None

    @property
    def _has_rank(self) -> bool:
        """Whether one of the replicas has a rank that is ready."""
        return any(replica.rank is not None for replica in self._replicas)

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

    async def _serve(self, replica: Replica) -> None:
        """Keep the rank of a replica alive as long as the engine is open."""
        while self._is_open and self._served.error is None:
            async with self._rank_factory(self._config, replica.index) as rank:
                problem = await self._drive(replica, rank)
            if problem is not None:
                where = f"replica {replica.index}: " if len(self._replicas) > 1 else ""
                logger.warning("%s%s; it is started again", where, problem)
                self._tally.num_restarts += 1
                batches, replica.running = replica.running, {}
                given = {name for batch in batches.values() for name in batch.request_ids}
                blamed = {*given, *self._tally.lost(replica.index)}
                self._requests.run_again(problem, blamed or None, replica.index)
                self._balance()
                await anyio.sleep(min(replica.num_lost_loads, MAX_PAUSE_S))

    async def _drive(self, replica: Replica, rank: Rank) -> str | None:
        """Work with a rank until it is lost; returns how that came about, None if the model can't be served."""
        rank.expect_reply(self._config.load_timeout_s)
        try:
            while self._served.error is None:
                reply: AnyReply | None = await rank.receive()
                while reply is not None:
                    await self._handle(replica, rank, reply)
                    reply = rank.receive_nowait()
                replica.tick(self._requests)
                self._balance()
        except RankLost as error:
            was_ready = replica.rank is not None
            replica.num_lost_loads = 0 if was_ready else replica.num_lost_loads + 1
            if was_ready or self._loads_again(replica):
                return str(error)
            self._fail_load(f"{self._config.model_path} can't be loaded: {error}")
        finally:
            replica.lost()
            self._loras.lost(replica.index)
        return None

    def _loads_again(self, replica: Replica) -> bool:
        """Whether a rank that couldn't load is started again.

        A model that was there before is there still, but a device may be in use by the rank that is leaving. Where
        others serve, a replica that doesn't come back is no reason to end their requests.
        """
        others_serve = replica.has_served and self._has_rank
        return self._served.model is not None and (others_serve or replica.num_lost_loads < MAX_LOST_LOADS)

    def _balance(self) -> None:
        """Let replicas without work take requests that wait elsewhere."""
        if len(self._replicas) > 1:
            for replica in balance(self._replicas, self._requests):
                replica.tick(self._requests)

    async def _calibrate(self, model: ModelInfo) -> None:
        """Measure what wasn't measured at an earlier start; then the model is said to be served."""
        try:
            await self._memory.calibrate(model, self.generate, len(self._replicas), self._code)
        finally:
            for replica in self._replicas:
                replica.scheduler.is_calibrating = False
            self._served.decide()

    def _code(self) -> Code:
        codes = [replica.code for replica in self._replicas]
        return Code(any(code.is_pending for code in codes), sum(code.num_changes for code in codes))

    def _tell_ranks(self, command: LoadLora | UnloadLora) -> list[int]:
        """Tell the ranks that are there; returns the indices of their replicas."""
        return [replica.index for replica in self._replicas if replica.send_adapter(command)]

    async def _handle(self, replica: Replica, rank: Rank, reply: AnyReply) -> None:
        match reply:
            case Alive(stage=stage):
                replica.heard(stage)
            case Ready(model=model):
                await self._ready(replica, rank, model)
            case LoadFailed(message=message):
                self._cannot_load(replica, message)
            case Pending(call=call):
                # Of requests that have ended meanwhile nobody would forget it.
                if call.request_id in self._requests:
                    self._tally.pending(call, replica.index)
                replica.scheduler.pending(call)
            case Judged():
                self._tally.judged(reply)
            case Noted(component=component, note=note):
                self._served.noted(component, note)
            case Compiling(is_pending=is_pending):
                replica.code = Code(is_pending, replica.code.num_changes + 1)
            case Launched(call_ids=call_ids):
                self._tally.launched(call_ids, replica.index)
                replica.scheduler.launched(call_ids)
            case Ran(call_ids=call_ids, elapsed_s=elapsed_s):
                self._tally.ran(reply, replica.index)
                replica.ran(reply)
                if reply.is_timed:
                    key = at_degree(reply.cost_key, reply.ranks.num if reply.ranks is not None else 1)
                    self._cost.observe(key, reply.rows, elapsed_s, reply.variant)
            case LoraLoaded() | LoraFailed() | LorasHeld():
                self._loras.heard(reply, replica.index)
            case Idle(first_rank=first_rank):
                replica.running.pop(first_rank, None)
            case Previewed() | Decoded() | Heard():
                await self._requests.take(reply, rank.tensors)
            case Stepped() | Finished() | TaskFailed() | TaskCancelled():
                if (completed := self._requests.report(reply)) is not None:
                    self._tasks.start_soon(self._requests.tell_completed, completed)
            case unknown:
                assert_never(unknown)

    async def _ready(self, replica: Replica, rank: Rank, model: ModelInfo) -> None:
        """A rank has loaded the model."""
        await self._memory.recall(model)
        known = self._served.model
        if known is not None and model.device != known.device:
            where = f"replica {replica.index} is on {model.device}, but the model is served on"
            self._cannot_load(replica, f"{where} {known.device}; see that each has GPUs of its own")
            return
        # What was noted since the others were ready holds as long as one of them serves.
        if known is None or not self._has_rank:
            self._served.model = model
        self._requests.fps = model.fps
        replica.served(rank)
        if model.is_whole:
            replica.scheduler.run_singly()
        if not self._config.calibration.calibrate or self._served.is_decided:
            self._served.decide()
        elif not replica.scheduler.is_calibrating and all(other.rank for other in self._replicas):
            for each in self._replicas:
                each.scheduler.is_calibrating = True
            self._tasks.start_soon(self._calibrate, model)

    def _cannot_load(self, replica: Replica, message: str) -> None:
        """A rank says that it can't serve the model.

        :raises RankLost: it could before, and there are others: it is tried again.
        """
        if replica.has_served and len(self._replicas) > 1:
            raise RankLost(f"the model can't be loaded again: {message}")
        self._fail_load(message)

    def _fail_load(self, message: str) -> None:
        """The model can't be served: everybody is told, and nothing is accepted any more."""
        self._served.fail(message)
        self._requests.abandon_all()
