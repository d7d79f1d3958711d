"""Jobs: what was accepted is done, whatever becomes of this process.

A job is on the disk, with its pictures, before a client hears of it. One that had no end when the server died runs
again. One that was running is a suspect: suspects run one after the other, so that of those that were running when the
server dies again at most one is a suspect, and that one fails.
"""

import logging
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

import anyio
import msgspec
from anyio.to_thread import run_sync

from sgld.config import ServerConfig
from sgld.errors import EngineClosed, ModelError, QueueFull, SgldError
from sgld.events import AnyEvent, Cancelled, Completed, Failed, Frames, Preview, Progress, Queued, Started
from sgld.media.inputs import InputPolicy, kept_in, references
from sgld.request import Limits
from sgld.sampling_params import SamplingParams
from sgld.server.job_store import UNSTORED, Asked, Job, JobError, JobStore, StoredFile
from sgld.server.requests import LiveRequest, Requests, new_id
from sgld.storage import Storage

logger = logging.getLogger(__name__)
CANCELLED = JobError(code="cancelled", message="the job was cancelled")
_DIED = JobError(code="server_died", message="the server died while it did this job, and again at the second attempt")
MAX_ATTEMPTS = 2
SWEEP_S = 60.0
# How long a job that comes back waits if there is no room for it in the queue.
_NO_ROOM_S = 1.0
# What ends a request but says nothing about it: it is done by the next server.
_NOT_ITS_FAULT = {EngineClosed.code, ModelError.code}


class Work(Protocol):
    """What is done with the outputs of one job."""

    @property
    def limits(self) -> Limits:
        """How much it can take, beside what the operator allows."""

    async def finish(self, live: LiveRequest, completed: Completed) -> None:
        """Take an output; with the last one, store all files and `keep` them."""


Works = Mapping[str, Callable[[Job], Work]]
"""How the jobs of each kind are worked on."""


@dataclass
class RunningJob:
    """A job on its way."""

    live: LiveRequest
    work: Work
    progress: int = 0
    """Percent; it never goes back."""
    eta_s: float | None = None
    ended: anyio.Event = field(default_factory=anyio.Event)
    _done: dict[int, float] = field(default_factory=dict)

    def hear(self, event: AnyEvent) -> None:
        """Take notice of an event."""
        match event:
            case Queued(eta_s=eta_s):
                self.eta_s = eta_s
            case Progress(output_index=index, step=step, num_steps=num_steps, eta_s=eta_s, stage=stage):
                self.eta_s = eta_s
                # What follows denoising is told with numbers of its own.
                self._done[index] = min(1.0, step / num_steps) if stage == "denoise" else 1.0
            case Completed(output_index=index):
                self._done[index] = 1.0
        percent = 100 * sum(self._done.values()) / self.live.params.num_outputs_per_prompt
        # 100 is said of what can be fetched.
        self.progress = max(self.progress, min(99, int(percent)))


class Jobs:
    """All jobs of a server.

    :param folder: of the pictures that jobs begin with.
    :param policy: where these pictures may come from.
    """

    def __init__(
        self,
        store: JobStore,
        requests: Requests,
        storage: Storage,
        *,
        folder: Path,
        policy: InputPolicy,
        model_path: str,
        config: ServerConfig,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.storage = storage
        self._store = store
        self._requests = requests
        self._folder = folder.absolute()
        self._policy = policy
        self._model_path = model_path
        self._config = config
        self._clock = clock
        self._works: Works = {}
        self._running: dict[str, RunningJob] = {}
        self._waiting: dict[str, anyio.Event] = {}
        """Jobs of an earlier server that aren't running again yet."""
        self._turns: WeakValueDictionary[tuple[str, str], anyio.Lock] = WeakValueDictionary()
        self._tasks = anyio.create_task_group()

    @asynccontextmanager
    async def open(self, works: Works) -> AsyncIterator[None]:
        """Work on jobs until the block ends, first on what an earlier server left; what has no end then waits."""
        self._works = works
        await self._remove_orphans()
        left = await self._left_over()
        self._waiting = {job.id: anyio.Event() for job in left}
        async with self._tasks, anyio.create_task_group() as background:
            background.start_soon(self._rerun_all, left)
            background.start_soon(self._sweep_often)
            try:
                yield
            finally:
                background.cancel_scope.cancel()
                self._requests.close()
                self._requests.cancel_all()

    async def submit(
        self, kind: str, owner: str, asked: Asked, *, key: str | None = None, body_hash: str | None = None
    ) -> Job:
        """Accept a job; where the owner's key was used before for the same, that is the job.

        :raises KeyReused: it was used for something else.
        :raises SgldError: the job is refused.
        :raises OSError: it can't be kept.
        """
        turn = anyio.Lock() if key is None else self._turns.setdefault((owner, key), anyio.Lock())
        async with turn:
            if key is not None and (known := await self._store.find(owner, key, body_hash)) is not None:
                return known
            job = Job(id=new_id(kind), kind=kind, owner=owner, created_at=int(self._clock()), asked=asked)
            async with self.forgotten_on_failure(job.id):
                params = await kept_in(self._folder / job.id, asked.params, self._policy)
                job = msgspec.structs.replace(job, asked=msgspec.structs.replace(asked, params=params))
                await self._store.add(job, key=key, body_hash=body_hash)
                await self._launch(job)
            return job

    async def get(self, job_id: str, kind: str, owner: str) -> Job | None:
        """A job, if there is one of this kind and it is the owner's."""
        job = await self._store.get(job_id)
        return job if job is not None and (job.kind, job.owner) == (kind, owner) else None

    async def page(self, owner: str, kind: str, *, after: str | None, limit: int, is_newest_first: bool) -> list[Job]:
        """Jobs of an owner after a certain one."""
        return await self._store.page(owner, kind, after=after, limit=limit, is_newest_first=is_newest_first)

    async def latest(self, limit: int) -> list[Job]:
        """The last jobs of all owners that have an end, in this order."""
        return await self._store.latest(limit)

    def running(self, job_id: str) -> RunningJob | None:
        """A job that is on its way now."""
        return self._running.get(job_id)

    async def wait_running(self, job_id: str) -> RunningJob | None:
        """A job on its way, None if it isn't any more; one that an earlier server left may have to wait for others."""
        if (waiting := self._waiting.get(job_id)) is not None:
            await waiting.wait()
        return self.running(job_id)

    def expires_at(self, job: Job) -> int | None:
        """When a finished job may be removed."""
        return None if job.completed_at is None else job.completed_at + int(self._config.result_ttl_s)

    async def announce(self, live: LiveRequest, files: Sequence[StoredFile]) -> None:
        """Files of a request that is no job are about to be stored: if the server dies then, they expire with it."""
        job = self._ended(live, files)
        await self._store.add(msgspec.structs.replace(job, status="failed", error=UNSTORED))

    async def keep(self, live: LiveRequest, files: Sequence[StoredFile]) -> None:
        """A request, a job or not, has an end: these files."""
        await self._store.complete(self._ended(live, files))

    def _ended(self, live: LiveRequest, files: Sequence[StoredFile]) -> Job:
        return Job(
            id=live.id,
            kind=live.kind,
            owner=live.owner,
            created_at=live.created_at,
            status="completed",
            asked=Asked(params=_without_inputs(live.params), model_path=self._model_path),
            files=tuple(files),
            completed_at=int(self._clock()),
        )

    async def cancel(self, job: Job) -> None:
        """End a job that is unfinished: it fails."""
        await self._store.fail(job.id, CANCELLED, int(self._clock()))
        await self._stop(job)

    async def delete(self, job: Job) -> None:
        """End a job if it is unfinished, and remove what there is of it."""
        await self._stop(job)
        await self.forget(job.id)

    async def sweep(self) -> None:
        """Remove what has expired."""
        before = int(self._clock() - self._config.result_ttl_s)
        for job in await self._store.expired(ended_before=before, max_bytes=self._config.result_max_bytes):
            await self.forget(job.id)

    async def _stop(self, job: Job) -> None:
        if (live := self._requests.get(job.id, job.owner)) is not None:
            live.cancel()
        if (running := self.running(job.id)) is not None:
            await running.ended.wait()

    async def forget(self, job_id: str) -> None:
        """Remove what there is of a job; the row last: whoever is interrupted here begins again with it."""
        await self.storage.delete(job_id)
        await run_sync(shutil.rmtree, self._folder / job_id, True)
        await self._store.delete(job_id)

    @asynccontextmanager
    async def forgotten_on_failure(self, job_id: str) -> AsyncIterator[None]:
        """Leave nothing of a job if the block doesn't come to its end: nobody else knows of it."""
        try:
            yield
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.forget(job_id)
            raise

    async def _launch(self, job: Job, waited_s: float = 0.0) -> RunningJob:
        work = self._works[job.kind](job)
        live = await self._requests.submit(
            job.asked.params,
            kind=job.kind,
            owner=job.owner,
            finish=work.finish,
            request_id=job.id,
            waited_s=waited_s,
            limits=work.limits,
        )
        self._running[job.id] = running = RunningJob(live, work)
        self._tasks.start_soon(self._follow, running)
        return running

    async def _follow(self, running: RunningJob) -> None:
        """Write down how a job goes; with one output that fails, all of it does."""
        live, problem, is_started = running.live, None, False
        try:
            with live.subscribe(ignores=(Preview, Frames)) as events:
                async for event in events:
                    running.hear(event)
                    if isinstance(event, Started) and not is_started:
                        is_started = True
                        await self._store.start(live.id)
                    elif isinstance(event, Failed | Cancelled):
                        problem = problem or event
                        live.cancel()
            if problem is not None:
                await self._settle(live.id, problem)
        except OSError as error:
            logger.error("what became of job %s isn't written down: %s", live.id, error)
        finally:
            del self._running[live.id]
            running.ended.set()

    async def _settle(self, job_id: str, problem: Failed | Cancelled) -> None:
        """Write down that a job wasn't completed: it failed, somebody cancelled it, or the server is about to leave."""
        if isinstance(problem, Failed):
            error, is_final = JobError(code=problem.code, message=problem.message), problem.code not in _NOT_ITS_FAULT
        else:
            error, is_final = CANCELLED, self._requests.is_open
        if is_final:
            await self._store.fail(job_id, error, int(self._clock()))
        else:
            await self._store.put_back(job_id, is_to_blame=False)

    async def _remove_orphans(self) -> None:
        """Remove pictures of requests that a server which was killed hadn't accepted yet."""
        for name in await run_sync(_names_in, self._folder):
            if await self._store.get(name) is None:
                await run_sync(shutil.rmtree, self._folder / name, True)

    async def _left_over(self) -> list[Job]:
        """What an earlier server left unfinished and this one does."""
        left: list[Job] = []
        for job in await self._store.unfinished():
            if job.asked.model_path != self._model_path:
                message = f"the job is for {job.asked.model_path}, and the server was started with {self._model_path}"
                await self._fail(job, JobError(code="model_changed", message=message))
            elif job.status == "in_progress" and job.attempts >= MAX_ATTEMPTS:
                await self._fail(job, _DIED)
            else:
                await self._store.put_back(job.id, is_to_blame=True)
                left.append(job)
        return left

    async def _rerun_all(self, jobs: list[Job]) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._rerun_suspects, [job for job in jobs if job.attempts])
            for job in jobs:
                if not job.attempts:
                    await self._rerun(job)

    async def _rerun_suspects(self, jobs: list[Job]) -> None:
        for job in jobs:
            if (running := await self._rerun(job)) is not None:
                await running.ended.wait()

    async def _rerun(self, job: Job) -> RunningJob | None:
        """Begin a job anew; its deadline still counts from when it came."""
        try:
            while (now := await self._store.get(job.id)) is not None and not now.is_finished:
                try:
                    # A clock that was set back makes no time; but what was accepted isn't refused.
                    return await self._launch(job, waited_s=max(self._clock() - job.created_at, 1e-3))
                except QueueFull:
                    await anyio.sleep(_NO_ROOM_S)
                except (EngineClosed, ModelError):
                    return None
                except SgldError as error:
                    await self._fail(job, JobError(code=error.code, message=str(error)))
            return None
        finally:
            self._waiting.pop(job.id).set()

    async def _fail(self, job: Job, error: JobError) -> None:
        logger.warning("job %s failed: %s", job.id, error.message)
        await self._store.fail(job.id, error, int(self._clock()))

    async def _sweep_often(self) -> None:
        while True:
            try:
                await self.sweep()
            except OSError as error:
                logger.error("results that have expired can't be removed: %s", error)
            await anyio.sleep(SWEEP_S)


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def _without_inputs(params: SamplingParams) -> SamplingParams:
    """What is kept of the params of a request that can't run again: uploads are large."""
    has_pictures = any(references(params.diffusers_kwargs))
    kwargs = {} if has_pictures else params.diffusers_kwargs
    return msgspec.structs.replace(params, image_path=(), diffusers_kwargs=kwargs)
