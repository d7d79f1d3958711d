"""Copies of a model on a clock of their own: each has ranks that share forwards, or run them side by side.

The schedulers and cost models are the real ones. What is launched while the ranks of a copy all run the forward before
is decided so much earlier as that one's class says, and begins when that is over. Each other forward begins some time
after the one whose end it waited for.
"""

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import msgspec
from policies import MAX_BATCH_SIZE, Class, Job, call_of, cost_key, profile_of, times_of

from sgld.engine.cost import CostModel, at_degree
from sgld.engine.demand import Demand, Profiles
from sgld.engine.routing import Load, busiest, choose
from sgld.engine.scheduler import Batch, Scheduler
from sgld.messages import CallInfo


@dataclass(frozen=True)
class Forward:
    """A forward on its way: when its ranks may be given the next one, when it is over, what it took, whose it is."""

    decides_at: float
    ends_at: float
    elapsed_s: float
    batch: Batch
    jobs: Sequence[Job]


class Copy:
    """One copy of the model, as the engine's replica of it.

    :param num_ranks: so many forwards may run side by side.
    :param degree: so many GPUs share each one, where it isn't chosen; 0: it is.
    :param gap_s: from the end of a forward of some ranks to the begin of the one that waited for it.
    :param noise: a forward takes longer than its class says, by this share in the mean (exponentially distributed).
    """

    def __init__(
        self,
        cost: CostModel,
        profiles: Profiles,
        num_ranks: int,
        degree: int = 0,
        *,
        gap_s: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        self.scheduler = Scheduler(
            cost, profiles, max_running_requests=32, max_batch_size=MAX_BATCH_SIZE, num_ranks=num_ranks
        )
        self.running: dict[int, Forward] = {}
        """By the first of its ranks."""
        self.jobs: dict[str, Job] = {}
        self._free_at = [0.0] * num_ranks
        self._cost, self._degree, self._num_ranks, self._gap_s, self._noise = cost, degree, num_ranks, gap_s, noise
        self._random = random.Random(0)
        self._ids = count(1)
        self._waited_for_some = False
        """What ended last some of the ranks ran."""

    def add(self, job: Job) -> None:
        """A request comes."""
        self.jobs[str(job.number)] = job
        self.scheduler.add(str(job.number), job.arrives_at, Demand(like=job.of.name, work=job.of.work))
        self._waited_for_some = False

    def begin(self, now: float) -> None:
        """Begin what can begin."""
        for name in self.scheduler.admit(now):
            self.scheduler.pending(self._call(self.jobs[name]))
        while (batch := self.scheduler.next_batch(now, [one.batch for one in self.running.values()])) is not None:
            jobs, ranks = [self.jobs[name] for name in batch.request_ids], batch.ranks
            of, stage = jobs[0].of, jobs[0].stage
            elapsed_s = of.tick_s(stage, len(jobs), self._degree or ranks.num)
            gap_s = self._gap_s if self._waited_for_some else 0.0
            begins_at = max(now + gap_s, *(self._free_at[rank] for rank in ranks.every))
            ends_at = begins_at + elapsed_s * (1 + (self._random.expovariate(1 / self._noise) if self._noise else 0.0))
            for rank in ranks.every:
                self._free_at[rank] = ends_at
            lead_s = of.lead_s(stage) if ranks.num == self._num_ranks else 0.0
            self.running[ranks.first] = Forward(max(ends_at - lead_s, now), ends_at, elapsed_s, batch, jobs)

    def end(self, first: int) -> list[Job]:
        """What follows a forward can be decided; the requests that are done by it."""
        forward = self.running.pop(first)
        jobs, batch = forward.jobs, forward.batch
        key = at_degree(cost_key(jobs[0], jobs[0].stage), batch.ranks.num)
        self._cost.observe(key, len(jobs), forward.elapsed_s)
        self._waited_for_some = batch.ranks.num < self._num_ranks
        self.scheduler.ran(batch.call_ids, forward.elapsed_s)
        done = []
        for job in jobs:
            job.stage, job.ends_at = job.stage + 1, forward.ends_at
            if 1 < job.stage <= job.of.num_steps + 1:
                self.scheduler.stepped(str(job.number), job.stage - 1)
            if job.is_done:
                done.append(job)
                del self.jobs[str(job.number)]
                self.scheduler.remove(str(job.number), is_completed=True)
            else:
                self.scheduler.pending(self._call(job))
        return done

    def _call(self, job: Job) -> CallInfo:
        max_degree = min(job.of.max_degree(job.stage), self._num_ranks)
        return msgspec.structs.replace(call_of(job, next(self._ids)), max_degree=max_degree, is_bound=job.stage == 0)


def copies_of(
    num: int, num_ranks: int, degree: int = 0, *, gap_s: float = 0.0, noise: float = 0.0, known: Sequence[Class] = ()
) -> list[Copy]:
    """So many copies, which learn together.

    :param known: what they have served before.
    """
    cost = CostModel()
    profiles = Profiles(cost)
    for of in known:
        cost.recall(times_of(of))
    profiles.recall(profile_of(of) for of in known)
    return [Copy(cost, profiles, num_ranks, degree, gap_s=gap_s, noise=noise) for _ in range(num)]


def play(copies: Sequence[Copy], jobs: Sequence[Job]) -> None:
    """Run all jobs to their ends."""
    num_done, coming = 0, list(reversed(jobs))
    events: list[tuple[float, int, int]] = []
    while num_done < len(jobs):
        now = min([coming[-1].arrives_at] if coming else [], default=float("inf"))
        now = min(now, events[0][0]) if events else now
        while events and events[0][0] <= now:
            _, index, first = heapq.heappop(events)
            num_done += len(copies[index].end(first))
        while coming and coming[-1].arrives_at <= now:
            copies[choose(_loads(copies, now)) if len(copies) > 1 else 0].add(coming.pop())
        _balance(copies, now)
        for index, copy in enumerate(copies):
            before = set(copy.running)
            copy.begin(now)
            for first in copy.running.keys() - before:
                heapq.heappush(events, (copy.running[first].decides_at, index, first))


def lone_s(of: Class, num_ranks: int, gap_s: float) -> float:
    """What a request takes while there is no other, beside what needs no device."""
    job = Job(0, of, 0.0)
    play(copies_of(1, num_ranks, gap_s=gap_s, known=[of]), [job])
    return job.ends_at


def _loads(copies: Sequence[Copy], now: float) -> list[Load]:
    return [Load(True, len(c.jobs), c.scheduler.backlog_s(now), num_queued=c.scheduler.num_queued) for c in copies]


def _balance(copies: Sequence[Copy], now: float) -> None:
    """As in the engine: who has nothing to do takes what others haven't started."""
    for idle in [copy for copy in copies if not copy.jobs]:
        source = busiest(_loads(copies, now)) if len(copies) > 1 else None
        if source is None:
            return
        giving = copies[source]
        for tracked in giving.scheduler.give_up(now, -(-len(giving.jobs) // 2)):
            idle.jobs[tracked.id] = giving.jobs.pop(tracked.id)
            idle.scheduler.adopt(tracked)
