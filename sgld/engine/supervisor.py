"""Keeps a rank for each replica: starts it, acts on what it says, and starts it again when it is lost."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import assert_never

import anyio
from anyio.abc import TaskGroup

from sgld.config import EngineConfig
from sgld.engine.adapters import EngineLoras
from sgld.engine.calibration import Code, Generate
from sgld.engine.memory import Memory
from sgld.engine.replica import Rank, RankFactory
from sgld.engine.replicas import Replica, balance
from sgld.engine.requests import Requests
from sgld.engine.served import Served
from sgld.engine.statistics import Tally
from sgld.errors import ModelError, ModelLost, RankLost
from sgld.messages import (
    Alive,
    AnyReply,
    Compiling,
    Decoded,
    Finished,
    Heard,
    Idle,
    Judged,
    Launched,
    LoadFailed,
    LoraDropped,
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
)

logger = logging.getLogger(__name__)
# So many ranks in a row may be lost before they are ready, where one was ready before.
MAX_LOST_LOADS = 3
# So long at most a replica pauses before it tries again to load, while others serve.
MAX_PAUSE_S = 60


@dataclass(kw_only=True)
class Supervisor:
    """Works as long as its tasks go on, or until the model can't be served.

    :param rank_factory: starts a rank.
    :param generate: runs a request, for calibration.
    """

    config: EngineConfig
    rank_factory: RankFactory
    replicas: Sequence[Replica]
    requests: Requests
    loras: EngineLoras
    served: Served
    memory: Memory
    tally: Tally
    generate: Generate
    _tasks: TaskGroup = field(init=False)

    @property
    def has_rank(self) -> bool:
        """Whether one of the replicas has a rank that is ready."""
        return any(replica.rank is not None for replica in self.replicas)

    def start(self, tasks: TaskGroup) -> None:
        """Start the ranks of all replicas, and keep them alive."""
        self._tasks = tasks
        for replica in self.replicas:
            tasks.start_soon(self._keep_alive, replica)

    async def _keep_alive(self, replica: Replica) -> None:
        while self.served.error is None:
            async with self.rank_factory(self.config, replica.index) as rank:
                problem = await self._drive(replica, rank)
            if problem is not None:
                self._recover(replica, problem)
                await anyio.sleep(min(replica.num_lost_loads, MAX_PAUSE_S))

    async def _drive(self, replica: Replica, rank: Rank) -> str | None:
        """Work with a rank until it is lost; returns how that came about, None if the model can't be served."""
        rank.expect_reply(self.config.load_timeout_s)
        try:
            while self.served.error is None:
                reply: AnyReply | None = await rank.receive()
                while reply is not None:
                    await self.handle(replica, rank, reply)
                    reply = rank.receive_nowait()
                replica.tick(self.requests)
                balance(self.replicas, self.requests)
        except RankLost as error:
            was_ready = replica.rank is not None
            replica.num_lost_loads = 0 if was_ready else replica.num_lost_loads + 1
            if was_ready or self._loads_again(replica):
                return str(error)
            self._fail_load(ModelLost(f"{self.config.model_path} can't be loaded: {error}"))
        finally:
            replica.lost()
            self.loras.lost(replica.index)
        return None

    def _loads_again(self, replica: Replica) -> bool:
        """Whether a rank that couldn't load is started again.

        A model that was there before is there still, but a device may be in use by the rank that is leaving. Where
        others serve, a replica that doesn't come back is no reason to end their requests.
        """
        others_serve = replica.has_served and self.has_rank
        return self.served.model is not None and (others_serve or replica.num_lost_loads < MAX_LOST_LOADS)

    def _recover(self, replica: Replica, problem: str) -> None:
        """Have the requests of a rank that was lost run again."""
        where = f"replica {replica.index}: " if len(self.replicas) > 1 else ""
        logger.warning("%s%s; it is started again", where, problem)
        self.tally.num_restarts += 1
        batches, replica.running = replica.running, {}
        given = {name for batch in batches.values() for name in batch.request_ids}
        blamed = {*given, *self.tally.lost(replica.index)}
        self.requests.run_again(problem, blamed or None, replica.index)
        balance(self.replicas, self.requests)

    async def handle(self, replica: Replica, rank: Rank, reply: AnyReply) -> None:
        """Act on what a rank says.

        :raises RankLost: the rank is of no use any more.
        """
        match reply:
            case Alive(stage=stage):
                replica.heard(stage)
            case Ready(model=model):
                await self._ready(replica, rank, model)
            case LoadFailed(message=message):
                self._cannot_load(replica, message)
            case Pending(call=call):
                # Of requests that have ended meanwhile nobody would forget it.
                if call.request_id in self.requests:
                    self.tally.pending(call, replica.index)
                replica.scheduler.pending(call)
            case Judged():
                self.tally.judged(reply)
            case Noted(component=component, note=note):
                self.served.noted(component, note)
            case Compiling(is_pending=is_pending):
                replica.code = Code(is_pending, replica.code.num_changes + 1)
            case Launched(call_ids=call_ids):
                self.tally.launched(call_ids, replica.index)
                replica.scheduler.launched(call_ids)
            case Ran():
                self.tally.ran(reply, replica.index)
                replica.ran(reply)
            case LoraDropped(path=path, alpha=alpha):
                replica.adapters.discard((path, alpha))
            case LoraLoaded() | LoraFailed() | LorasHeld():
                if isinstance(reply, LoraFailed):
                    replica.adapters.discard((reply.path, reply.alpha))
                self.loras.heard(reply, replica.index)
            case Idle(first_rank=first_rank):
                replica.running.pop(first_rank, None)
            case Previewed() | Decoded() | Heard():
                await self.requests.take(reply, rank.tensors)
            case Stepped() | Finished() | TaskFailed() | TaskCancelled():
                if (completed := self.requests.report(reply)) is not None:
                    self._tasks.start_soon(self.requests.tell_completed, completed)
            case unknown:
                assert_never(unknown)

    async def _ready(self, replica: Replica, rank: Rank, model: ModelInfo) -> None:
        """A rank has loaded the model."""
        await self.memory.recall(model)
        known = self.served.model
        if known is not None and model.device != known.device:
            where = f"replica {replica.index} is on {model.device}, but the model is served on"
            self._cannot_load(replica, f"{where} {known.device}; see that each has GPUs of its own")
            return
        # What was noted since the others were ready holds as long as one of them serves.
        if known is None or not self.has_rank:
            self.served.model = model
        self.requests.fps = model.fps
        replica.served(rank)
        if model.is_whole:
            replica.scheduler.run_singly()
        if not self.config.calibration.calibrate or self.served.is_decided:
            self.served.decide()
        elif not replica.scheduler.is_calibrating and all(other.rank for other in self.replicas):
            for each in self.replicas:
                each.scheduler.is_calibrating = True
            self._tasks.start_soon(self._calibrate, model)

    async def _calibrate(self, model: ModelInfo) -> None:
        """Measure what wasn't measured at an earlier start; then the model is said to be served."""
        try:
            await self.memory.calibrate(model, self.generate, len(self.replicas), self._code)
        finally:
            for replica in self.replicas:
                replica.scheduler.is_calibrating = False
            # Nothing was known when these requests came.
            self.tally.etas.count_anew()
            self.served.decide()

    def _code(self) -> Code:
        codes = [replica.code for replica in self.replicas]
        return Code(any(code.is_pending for code in codes), sum(code.num_changes for code in codes))

    def _cannot_load(self, replica: Replica, message: str) -> None:
        """A rank says that it can't serve the model.

        :raises RankLost: it could before, and there are others: it is tried again.
        """
        if replica.has_served and len(self.replicas) > 1:
            raise RankLost(f"the model can't be loaded again: {message}")
        self._fail_load(ModelError(message))

    def _fail_load(self, error: ModelError) -> None:
        """The model can't be served: everybody is told, and nothing is accepted any more."""
        self.served.fail(error)
        self.requests.abandon_all()
