"""One GPU on a clock of its own, jobs that it works on, and policies that say who runs next."""

import bisect
import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from typing import Protocol

from sgld.engine.cost import CostModel, LearnedTime, at_degree
from sgld.engine.demand import CallClass, Demand, Profile, Profiles
from sgld.engine.scheduler import Batch, Scheduler
from sgld.messages import CallInfo, CallKind

SLO_SCALE = 3.0
MAX_BATCH_SIZE = 16

# TFLOP of one step with guidance to its seconds: Qwen-Image-2512, bf16, compiled, one H200. One row at 512² has 32
# TFLOP, at 1024² 139. Source: sgl-project/sglang, pull request 22183.
MEASURED = {32: 0.167, 64: 0.183, 96: 0.186, 128: 0.240, 139: 0.243, 256: 0.425, 278: 0.474, 417: 0.711, 512: 0.832}
TFLOP = {512: 32, 768: 73, 1024: 139, 1536: 380}
ENCODE_S = 0.03
DECODE_S = 0.04
"""At 512²; in proportion to the pixels."""


@dataclass(frozen=True)
class Class:
    """Requests of one size."""

    side: int
    num_steps: int
    share: float

    @property
    def name(self) -> str:
        return f"{self.side}²"

    @property
    def alone_s(self) -> float:
        """Seconds of a request, from when it is sent to its answer, when there is no other."""
        return sum(self.tick_s(stage, 1) for stage in range(self.num_steps + 2)) + self.rest_s

    def tick_s(self, stage: int, rows: int, degree: int = 1) -> float:
        """Seconds of a forward on so many ranks. Stage 0 encodes, the last one decodes, each other one is a step."""
        if stage == 0:
            return self.encode_s
        return self.step_s(rows) if stage <= self.num_steps else self.decode_s

    def max_degree(self, stage: int) -> int:
        """So many ranks can share a forward."""
        return 1

    @property
    def rest_s(self) -> float:
        """Of these, the seconds in which it needs no device: on its way there and back, and while a file is written."""
        return 0.0

    def lead_s(self, stage: int) -> float:
        """How long before the end of a forward it is decided what follows: who comes later has no say."""
        return 0.0

    @property
    def work(self) -> float:
        """Pixels times steps."""
        return self.side**2 * float(self.num_steps)

    def step_s(self, rows: int) -> float:
        """Seconds of a step of so many requests."""
        return step_s(self.side, rows)

    @property
    def encode_s(self) -> float:
        return ENCODE_S

    @property
    def decode_s(self) -> float:
        return DECODE_S * (self.side / 512) ** 2


MIXES = {
    "C": (Class(512, 20, 0.15), Class(768, 20, 0.25), Class(1024, 25, 0.45), Class(1536, 35, 0.15)),
    "A": (Class(512, 20, 1.0),),
}
# As mix C with sides of three sixteenths, for the model that ships.
SMALL = tuple(replace(of, side=3 * of.side // 16) for of in MIXES["C"])


def mix_of(name: str, share: float = 1.0) -> list[Class]:
    """A mix by its name, whose requests have this share of their steps."""
    every = {**MIXES, "small": SMALL}
    return [replace(of, num_steps=max(round(share * of.num_steps), 2)) for of in every[name]]


@cache
def step_s(side: int, rows: int) -> float:
    """Measured, or on the straight line between the nearest measurements of as many operations."""
    work, known = TFLOP[side] * rows, sorted(MEASURED)
    right = min(max(bisect.bisect_left(known, work), 1), len(known) - 1)
    low, high = known[right - 1], known[right]
    return MEASURED[low] + (MEASURED[high] - MEASURED[low]) * (work - low) / (high - low)


@dataclass(eq=False)
class Job:
    """A request on its way."""

    number: int
    of: Class
    arrives_at: float
    stage: int = 0
    ends_at: float = 0.0

    @property
    def is_done(self) -> bool:
        return self.stage == self.of.num_steps + 2

    @property
    def is_denoising(self) -> bool:
        return 0 < self.stage <= self.of.num_steps

    @property
    def num_steps_left(self) -> int:
        return self.of.num_steps + 1 - max(self.stage, 1)

    @property
    def remaining_s(self) -> float:
        return self.num_steps_left * self.of.step_s(1) + self.of.decode_s

    @property
    def deadline_at(self) -> float:
        return self.arrives_at + SLO_SCALE * self.of.alone_s

    @property
    def latency_s(self) -> float:
        return self.ends_at - self.arrives_at + self.of.rest_s

    @property
    def is_in_time(self) -> bool:
        return self.latency_s <= SLO_SCALE * self.of.alone_s


class Policy(Protocol):
    """Who runs next."""

    def add(self, job: Job) -> None:
        """A job arrives."""

    def choose(self, now: float) -> list[Job]:
        """Jobs whose calls run as one forward; none if there is nothing to do."""
        ...

    def ran(self, jobs: Sequence[Job], elapsed_s: float) -> None:
        """They did, and went on to their next stages."""


def play(policy: Policy, jobs: Sequence[Job], tick_s: Callable[[Sequence[Job]], float]) -> None:
    """Run all jobs to their ends.

    :param tick_s: runs those that share a forward; seconds that it took.
    """
    now, decides_at, num_come, num_done = 0.0, 0.0, 0, 0
    while num_done < len(jobs):
        while num_come < len(jobs) and jobs[num_come].arrives_at <= decides_at:
            policy.add(jobs[num_come])
            num_come += 1
        chosen = policy.choose(now)
        if not chosen:
            now = decides_at = max(now, jobs[num_come].arrives_at)
            continue
        elapsed_s, lead_s = tick_s(chosen), chosen[0].of.lead_s(chosen[0].stage)
        now += elapsed_s
        decides_at = now - lead_s
        for job in chosen:
            job.stage += 1
            job.ends_at = now
            num_done += job.is_done
        policy.ran(chosen, elapsed_s)


class InOrder(Policy):
    """One at a time, the one with the least key first; keys don't change while a job waits."""

    def __init__(self, key: Callable[[Job], float]) -> None:
        self._key = key
        self._heap: list[tuple[float, int, Job]] = []

    def add(self, job: Job) -> None:
        heapq.heappush(self._heap, (self._key(job), job.number, job))

    def choose(self, now: float) -> list[Job]:
        return [self._heap[0][2]] if self._heap else []

    def ran(self, jobs: Sequence[Job], elapsed_s: float) -> None:
        heapq.heappop(self._heap)
        if not jobs[0].is_done:
            self.add(jobs[0])


@dataclass
class Merging(Policy):
    """All that wait are looked at; subclasses say who runs."""

    jobs: list[Job] = field(default_factory=list)

    def add(self, job: Job) -> None:
        self.jobs.append(job)

    def ran(self, jobs: Sequence[Job], elapsed_s: float) -> None:
        self.jobs = [job for job in self.jobs if not job.is_done]

    def choose(self, now: float) -> list[Job]:
        raise NotImplementedError


class GreedyFifo(Merging):
    """The one that came first, and with it all that can share its forward; to be ready for that, all encode at once."""

    def choose(self, now: float) -> list[Job]:
        if not self.jobs:
            return []
        head = next((job for job in self.jobs if job.stage == 0), self.jobs[0])
        return [head, *(job for job in self.jobs[1:] if can_share(head, job))][:MAX_BATCH_SIZE]


class Oracle(Merging):
    """Knows all times: least remaining time first, without ageing, and rows that pay by these times.

    No policy is known to be best when jobs share forwards; this is the best of those that were tried.
    """

    def choose(self, now: float) -> list[Job]:
        order = sorted(self.jobs, key=lambda job: (job.remaining_s, job.number))
        batch: list[Job] = []
        for num_ahead, job in enumerate(order):
            if not batch:
                batch = [job]
            elif can_share(batch[0], job) and len(batch) < MAX_BATCH_SIZE:
                delta_s = job.of.step_s(len(batch) + 1) - job.of.step_s(len(batch))
                if num_ahead * delta_s >= (len(order) - num_ahead) * (job.of.step_s(1) - delta_s):
                    break
                batch.append(job)
        # Who has encoded can join.
        newcomer = next((job for job in order if job.stage == 0 and batch[0].of is job.of), None)
        return [newcomer] if newcomer is not None else batch


def can_share(head: Job, job: Job) -> bool:
    """Steps of one size are merged; encoding and decoding are not."""
    return head.is_denoising and job.is_denoising and head.of is job.of


class Sgld(Policy):
    """The real scheduler and cost model, told what a rank tells them.

    :param known: what it has served before.
    """

    def __init__(self, max_running_requests: int = 32, known: Sequence[Class] = ()) -> None:
        self.decision_s: list[float] = []
        self._cost = CostModel()
        profiles = Profiles(self._cost)
        self._scheduler = Scheduler(
            self._cost, profiles, max_running_requests=max_running_requests, max_batch_size=MAX_BATCH_SIZE
        )
        for of in known:
            self._cost.recall(times_of(of))
        profiles.recall(profile_of(of) for of in known)
        self._jobs: dict[str, Job] = {}
        self._ids = count(1)
        self._batch: Batch | None = None

    def add(self, job: Job) -> None:
        name = str(job.number)
        self._jobs[name] = job
        self._scheduler.add(name, job.arrives_at, Demand(like=job.of.name, work=job.of.work))

    def choose(self, now: float) -> list[Job]:
        start = time.thread_time()
        for name in self._scheduler.admit(now):
            self._scheduler.pending(call_of(self._jobs[name], next(self._ids)))
        self._batch = self._scheduler.next_batch(now)
        self.decision_s.append(time.thread_time() - start)
        return [self._jobs[name] for name in self._batch.request_ids] if self._batch else []

    def ran(self, jobs: Sequence[Job], elapsed_s: float) -> None:
        assert self._batch is not None
        self._scheduler.ran(self._batch.call_ids, elapsed_s)
        self._learn(jobs[0], len(jobs), elapsed_s)
        for job in jobs:
            name = str(job.number)
            if 1 < job.stage <= job.of.num_steps + 1:
                self._scheduler.stepped(name, job.stage - 1)
            if job.is_done:
                del self._jobs[name]
                self._scheduler.remove(name, is_completed=True)
            else:
                self._scheduler.pending(call_of(job, next(self._ids)))

    def _learn(self, ran: Job, rows: int, elapsed_s: float) -> None:
        """From a forward of a stage that is over."""
        self._cost.observe(cost_key(ran, ran.stage - 1), rows, elapsed_s)


def call_of(job: Job, number: int) -> CallInfo:
    """What the scheduler is told of the next stage of a job."""
    kind: CallKind = "encode" if job.stage == 0 else "denoise" if job.is_denoising else "decode"
    return CallInfo(
        id=number,
        request_id=str(job.number),
        kind=kind,
        component=kind,
        merge_key=job.of.name if job.is_denoising else None,
        cost_key=cost_key(job, job.stage),
        rows=1,
        step_index=max(job.stage - 1, 0),
        num_steps=job.of.num_steps if job.stage else 0,
    )


def cost_key(job: Job, stage: int) -> str:
    """What the times of a stage of a job are learned under."""
    side = job.of.side // 8
    if stage == 0:
        return "text_encoder.forward(64)"
    if stage <= job.of.num_steps:
        return f"transformer.forward({side * side // 4}x64)"
    return f"vae.decode(16x{side}x{side})"


def times_of(of: Class) -> list[LearnedTime]:
    """What a scheduler knows that has served such requests."""
    degrees = [2**n for n in range(max(map(of.max_degree, range(of.num_steps + 2))).bit_length())]
    return [
        (at_degree(key, degree), rows, "eager", of.tick_s(stage, rows, degree))
        for degree in degrees
        for (_, key, rows), stage in _forwards(of)
        if degree <= of.max_degree(stage)
    ]


def _forwards(of: Class) -> list[tuple[CallClass, int]]:
    """All that differ, each with a stage in which it runs."""
    job, last = Job(0, of, 0.0), of.num_steps + 1
    steps: list[tuple[CallClass, int]] = [
        (("denoise", cost_key(job, 1), rows), 1) for rows in range(1, MAX_BATCH_SIZE + 1)
    ]
    return [(("encode", cost_key(job, 0), 1), 0), *steps, (("decode", cost_key(job, last), 1), last)]


def profile_of(of: Class) -> Profile:
    """The calls of a request."""
    calls = [(call, of.num_steps if call[0] == "denoise" else 1) for call, _ in _forwards(of) if call[2] == 1]
    return Profile(of.name, of.work, tuple(calls))


POLICIES: dict[str, Callable[[], Policy]] = {
    "FIFO": lambda: InOrder(lambda job: job.arrives_at),
    "FIFO, greedy merging": GreedyFifo,
    "EDF": lambda: InOrder(lambda job: job.deadline_at),
    "sgld": Sgld,
    "oracle": Oracle,
}
