"""The replicas of an engine: what each one runs, and how requests move to those that have nothing to do."""

import logging
import time
from collections.abc import Sequence

from sgld.config import EngineConfig
from sgld.engine.calibration import NO_NEWS
from sgld.engine.cost import CostModel, at_degree
from sgld.engine.demand import Profiles
from sgld.engine.remaining import Tracked
from sgld.engine.replica import Rank
from sgld.engine.requests import Requests
from sgld.engine.routing import AdapterSource, Load, adapters_of, busiest, choose
from sgld.engine.scheduler import Batch, Scheduler
from sgld.engine.stages import Stages
from sgld.engine.statistics import ReplicaStatistics
from sgld.errors import RankLost
from sgld.messages import AnyCommand, LoadLora, LorasHeld, Ran, Run, UnloadLora
from sgld.request import RequestState
from sgld.sampling_params import SamplingParams

logger = logging.getLogger(__name__)
# A forward that takes this many times its prediction hangs.
HANG_FACTOR = 20.0
# Where nothing can be predicted yet, a forward may take so many times the shortest deadline.
UNKNOWN_FACTOR = 10.0


class Replica:
    """One copy of the model: its rank, its scheduler, and the batches that run."""

    def __init__(self, index: int, config: EngineConfig, cost: CostModel, profiles: Profiles) -> None:
        self.index = index
        self._cost = cost
        self.scheduler = Scheduler(
            cost,
            profiles,
            max_running_requests=config.max_running_requests,
            max_queued_requests=config.max_queued_requests,
            max_batch_size=config.max_batch_size,
            num_ranks=config.parallel.num_lanes,
        )
        self._num_lanes = config.parallel.num_lanes
        self.rank: Rank | None = None
        """None while no rank is ready."""
        self.running: dict[int, Batch] = {}
        """By the first of the ranks that run it."""
        self._beside_s: dict[int, float] = {}
        """What other ranks have computed since these have a batch."""
        self.code = NO_NEWS
        """Of code that its rank will run."""
        self.has_served = False
        """A rank of it was ready once."""
        self.num_lost_loads = 0
        """Ranks in a row that were lost before they were ready."""
        self.adapters: set[AdapterSource] = set()
        """Those that its rank has read, or is told to read."""
        self._run_timeout_s = config.run_timeout_s
        self._stages = Stages()

    def load(self, requests: Requests) -> Load:
        """What it has to do."""
        return Load(
            is_ready=self.rank is not None,
            num_requests=requests.num_of(self.index),
            backlog_s=self.scheduler.backlog_s(time.monotonic()),
            adapters=frozenset(self.adapters),
            num_queued=self.scheduler.num_queued,
        )

    def heard(self, stage: str) -> None:
        """The rank lives; what it does is in the log while it loads."""
        line = self._stages.heard(stage)
        if self.rank is not None:
            logger.debug("the rank of replica %d is %s", self.index, stage)
        elif line is not None:
            logger.info("replica %d: %s", self.index, line)

    def served(self, rank: Rank) -> None:
        """A rank is ready."""
        self.rank, self.has_served = rank, True
        logger.info("replica %d: ready after %.1f s", self.index, self._stages.elapsed_s)

    def send(self, command: AnyCommand) -> bool:
        """Tell the rank, if there is one."""
        if self.rank is None:
            return False
        try:
            self.rank.send(command)
        except RankLost:
            # Whoever waits for its replies sees it, too, and recovers.
            logger.debug("%s wasn't sent, the rank is gone", command)
        return True

    def send_adapter(self, command: LoadLora | UnloadLora) -> bool:
        """Tell the rank, if there is one, to have an adapter or not."""
        source = command.path, command.alpha
        if is_there := self.send(command):
            self.adapters = self.adapters | {source} if isinstance(command, LoadLora) else self.adapters - {source}
        return is_there

    def tick(self, requests: Requests) -> None:
        """Start what may start and, when the rank has nothing to run, give it the next batch."""
        if self.rank is None:
            return
        for command in requests.admit(self.index):
            self.adapters |= adapters_of(command.params)
            self.send(command)
        while (batch := self.scheduler.next_batch(time.monotonic(), self.running.values())) is not None:
            self.running[batch.ranks.first] = batch
            self._beside_s[batch.ranks.first] = 0.0
            ranks = batch.ranks if self._num_lanes > 1 else None
            self.send(Run(call_ids=batch.call_ids, num_ticks=batch.num_ticks, ranks=ranks))
        self.rank.expect_reply(self._silence_limit_s(requests))

    def ran(self, reply: Ran) -> None:
        """A forward is over.

        :raises RankLost: other ranks should have been done with theirs long ago. That is told by what was computed
            meanwhile: a replica isn't silent while only some of its ranks hang, and clocks go on while it is suspended.
        """
        self.scheduler.ran(reply.call_ids, reply.elapsed_s)
        if reply.is_timed:
            key = at_degree(reply.cost_key, reply.ranks.num if reply.ranks is not None else 1)
            self._cost.observe(key, reply.rows, reply.elapsed_s, reply.variant)
        if reply.ranks is None:
            return
        for first, batch in self.running.items():
            if first != reply.ranks.first:
                self._beside_s[first] = self._beside_s.get(first, 0.0) + reply.elapsed_s
                # Beside others an order is of one forward.
                if self._beside_s[first] > self._num_lanes * self._limit_s(batch.predicted_s):
                    raise RankLost(f"{batch.ranks} hung: others computed for {self._beside_s[first]:.0f} s meanwhile")

    def _limit_s(self, predicted_s: float | None) -> float:
        """How long a forward may take."""
        if predicted_s is None:
            return UNKNOWN_FACTOR * self._run_timeout_s
        return max(self._run_timeout_s, HANG_FACTOR * predicted_s)

    def _silence_limit_s(self, requests: Requests) -> float | None:
        """How long the rank may be silent: while it has work, as long as its forward may take."""
        if not self.running and not requests.num_in(RequestState.RUNNING, self.index):
            return None
        return max((self._limit_s(batch.predicted_s) for batch in self.running.values()), default=self._limit_s(None))

    def lost(self) -> None:
        """The rank is gone."""
        self.rank, self._stages, self.code = None, Stages(), NO_NEWS
        self.adapters.clear()

    def statistics(self, requests: Requests, adapters: LorasHeld) -> ReplicaStatistics:
        """What it does now; the queues to its rank are None while there is none."""
        tensor_queue, channel = self.rank.statistics() if self.rank is not None else (None, None)
        return ReplicaStatistics(
            is_ready=self.rank is not None,
            num_queued=requests.num_in(RequestState.QUEUED, self.index),
            num_running=requests.num_in(RequestState.RUNNING, self.index),
            tensor_queue=tensor_queue,
            channel=channel,
            adapters=adapters,
            is_compiling=self.code.is_pending,
            num_code_changes=self.code.num_changes,
        )


def place(params: SamplingParams, replicas: Sequence[Replica], requests: Requests) -> Replica:
    """The replica that gets a new request."""
    if len(replicas) == 1:
        return replicas[0]
    return replicas[choose([replica.load(requests) for replica in replicas], adapters_of(params))]


def tell_ranks(replicas: Sequence[Replica], command: LoadLora | UnloadLora) -> list[int]:
    """Tell the ranks that are there; returns the indices of their replicas."""
    return [replica.index for replica in replicas if replica.send_adapter(command)]


def balance(replicas: Sequence[Replica], requests: Requests) -> None:
    """Let replicas take requests that others haven't started.

    1. One whose rank was lost gives all that it has, evenly: to load a model may take minutes.
    2. One without work takes so many that both have as many.
    """
    if len(replicas) == 1:
        return
    ready = [replica for replica in replicas if replica.rank is not None]
    took: dict[int, Replica] = {}
    for lost in [replica for replica in replicas if replica.rank is None and replica.has_served and ready]:
        for tracked in lost.scheduler.give_up(time.monotonic(), lost.scheduler.num_queued):
            _move(tracked, min(ready, key=lambda other: requests.num_of(other.index)), requests, took)
    for idle in [replica for replica in ready if not requests.num_of(replica.index)]:
        source = busiest([other.load(requests) for other in replicas])
        if source is None:
            break
        for tracked in replicas[source].scheduler.give_up(time.monotonic(), -(-requests.num_of(source) // 2)):
            _move(tracked, idle, requests, took)
    for replica in took.values():
        replica.tick(requests)


def _move(tracked: Tracked, replica: Replica, requests: Requests, took: dict[int, Replica]) -> None:
    replica.scheduler.adopt(tracked)
    requests.move(tracked.id, replica.index)
    took[replica.index] = replica
