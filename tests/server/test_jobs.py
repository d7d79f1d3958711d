"""Jobs over the starts and ends of servers."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from sgld.config import ServerConfig
from sgld.errors import QueueFull
from sgld.events import Completed
from sgld.media.inputs import InputPolicy
from sgld.request import NO_LIMITS, Limits
from sgld.sampling_params import SamplingParams
from sgld.server.bodies import data_url
from sgld.server.job_store import Asked, Job, JobStore, StoredFile
from sgld.server.jobs import Jobs, RunningJob
from sgld.server.requests import LiveRequest, Requests
from sgld.storage.local import LocalStorage

from .fakes import TIMEOUT_S, FakeEngine, running
from .test_edits import png

OWNER = "somebody"


@dataclass
class Writes:
    """Work that writes the seed of each output."""

    jobs: Jobs
    files: dict[int, StoredFile]
    limits: Limits = NO_LIMITS

    async def finish(self, live: LiveRequest, completed: Completed) -> None:
        key = f"{live.id}/{completed.output_index}"
        await self.jobs.storage.put(key, str(completed.seed).encode(), "text/plain")
        file = StoredFile(key=key, media_type="text/plain", width=1, height=1, seed=completed.seed, size_bytes=1)
        self.files[completed.output_index] = file
        if len(self.files) == live.params.num_outputs_per_prompt:
            await self.jobs.keep(live, [file for _, file in sorted(self.files.items())])


@dataclass
class Server:
    """The parts that a server has, without HTTP."""

    jobs: Jobs
    store: JobStore
    engine: FakeEngine

    async def submit(self, prompt: str, *, key: str | None = None, body_hash: str = "", **params: Any) -> Job:
        asked = Asked(params=SamplingParams(prompt=prompt, **params), model_path="m")
        return await self.jobs.submit("video", OWNER, asked, key=key, body_hash=body_hash)

    async def now(self, job: Job) -> Job:
        found = await self.store.get(job.id)
        assert found is not None
        return found

    async def running(self, job: Job) -> RunningJob:
        running = await self.jobs.wait_running(job.id)
        assert running is not None
        return running

    async def ended(self, job: Job) -> Job:
        """The job, when it has an end."""
        if (running := await self.jobs.wait_running(job.id)) is not None:
            await running.ended.wait()
        return await self.now(job)


def left_in(folder: Path) -> list[Path]:
    """What there is of requests in a data folder."""
    return [*folder.glob("inputs/*"), *folder.glob("results/*")]


def write(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")


def content_of(path: str) -> bytes:
    return Path(path).read_bytes()


@asynccontextmanager
async def serving(
    folder: Path, engine: FakeEngine | None = None, *, is_killed: bool = False, clock: Any = None, **settings: Any
) -> AsyncIterator[Server]:
    """A server; killed, it writes nothing at its end."""
    engine, store = engine or FakeEngine(), JobStore(folder / "jobs.sqlite3")
    with anyio.fail_after(TIMEOUT_S):
        async with Requests(engine, InputPolicy()) as requests:
            jobs = Jobs(
                store,
                requests,
                LocalStorage(folder / "results"),
                folder=folder / "inputs",
                policy=InputPolicy(),
                model_path="m",
                config=ServerConfig(**settings),
                **({"clock": clock} if clock else {}),
            )
            async with jobs.open({"video": lambda job: Writes(jobs, {})}):
                yield Server(jobs, store, engine)
                if is_killed:
                    store.close()
    store.close()


async def test_a_job_is_done(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        job = await server.ended(await server.submit("a cat", num_outputs_per_prompt=2, seed=7))

        assert (job.status, job.attempts) == ("completed", 1)
        assert [await server.jobs.storage.read(file.key) for file in job.files] == [b"7", b"8"]


async def test_progress_is_percent_of_all_outputs_and_100_is_for_the_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        job = await server.submit("hang", num_inference_steps=4, num_outputs_per_prompt=2)
        await server.engine.hanging.wait()
        running = await server.running(job)
        await anyio.wait_all_tasks_blocked()

        assert running.progress == 12


async def test_a_failure_is_kept_and_ends_the_other_outputs(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        job = await server.ended(await server.submit("fail out_of_memory", num_outputs_per_prompt=2))

    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.message) == ("out_of_memory", "it broke")


async def test_a_refused_job_leaves_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        with pytest.raises(QueueFull):
            await server.submit("refuse queue_full", image_path=(data_url(png()),), key="k")

        assert await server.jobs.page(OWNER, "video", after=None, limit=9, is_newest_first=True) == []
        assert not left_in(tmp_path)
        assert (await server.ended(await server.submit("a cat", key="k"))).status == "completed"


@pytest.mark.parametrize("is_killed", [True, False])
async def test_what_was_unfinished_is_done_by_the_next_server(tmp_path: Path, is_killed: bool) -> None:
    async with serving(tmp_path, is_killed=is_killed) as server:
        done = await server.ended(await server.submit("a cat"))
        job = await server.submit("wait", seed=3, deadline_s=9.0)
        await server.engine.hanging.wait()
        before = await server.now(job)
    engine = FakeEngine()
    engine.go.set()
    async with serving(tmp_path, engine) as server:
        after = await server.ended(job)

        assert (before.status, before.attempts) == ("in_progress", 1)
        assert (after.status, after.attempts) == ("completed", 2 if is_killed else 1)
        assert await server.jobs.storage.read(after.files[0].key) == b"3"
        assert await server.now(done) == done
    # Its deadline counts from when the job came.
    assert [(params.prompt, params.deadline_s) for params in engine.params] == [("wait", 9.0)]
    assert engine.waited_s[0] > 0


async def test_pictures_of_a_job_are_there_for_the_next_server(tmp_path: Path) -> None:
    async with serving(tmp_path, is_killed=True) as server:
        kwargs = {"mask_image": {"$image": data_url(png(color=(9, 9, 9))), "mode": "L"}}
        job = await server.submit("hang", image_path=(data_url(png()),), diffusers_kwargs=kwargs)
        await server.engine.hanging.wait()
        (picture,) = job.asked.params.image_path
        mask = job.asked.params.diffusers_kwargs["mask_image"]
    async with serving(tmp_path) as server:
        params = (await server.running(job)).live.params

        assert content_of(picture) == png()
        assert content_of(mask["$image"]) == png(color=(9, 9, 9))
        assert (params.image_path, params.diffusers_kwargs["mask_image"]) == ((picture,), mask)
        await server.jobs.delete(job)
    assert not left_in(tmp_path)


async def test_pictures_of_a_request_that_was_not_accepted_are_removed(tmp_path: Path) -> None:
    async with serving(tmp_path, is_killed=True) as server:
        job = await server.submit("hang", image_path=(data_url(png()),))
    write(tmp_path / "inputs" / "video_0" / "0")
    async with serving(tmp_path) as server:
        left = [path.name for path in left_in(tmp_path)]

    assert left == [job.id]


async def test_a_job_that_kills_two_servers_fails_and_its_company_does_not(tmp_path: Path) -> None:
    async with serving(tmp_path, is_killed=True) as server:
        jobs = [await server.submit("hang", seed=seed) for seed in range(3)]
        for job in jobs:
            while (await server.now(job)).status != "in_progress":
                await anyio.lowlevel.checkpoint()
    async with serving(tmp_path, is_killed=True) as server:
        await server.engine.hanging.wait()
        # The first one only: together nobody could tell who it is.
        while (await server.now(jobs[0])).status != "in_progress":
            await anyio.lowlevel.checkpoint()
        assert [params.seed for params in server.engine.params] == [0]
    async with serving(tmp_path) as server:
        states = [await server.now(job) for job in jobs]

        assert [state.status for state in states] == ["failed", "queued", "queued"]
        assert states[0].error is not None
        assert states[0].error.code == "server_died"


async def test_a_job_of_another_model_fails(tmp_path: Path) -> None:
    async with serving(tmp_path, is_killed=True) as server:
        job = await server.submit("hang")
        asked = msgspec.structs.replace(job.asked, model_path="other")
        await server.store.add(msgspec.structs.replace(job, id="video_other", asked=asked))
    async with serving(tmp_path) as server:
        found = await server.jobs.get("video_other", "video", OWNER)

    assert found is not None
    assert found.error is not None
    assert found.error.code == "model_changed"


@pytest.mark.parametrize("code", ["engine_closed", "model_error"])
async def test_what_isnt_the_jobs_fault_leaves_it_for_the_next_server(tmp_path: Path, code: str) -> None:
    async with serving(tmp_path) as server:
        job = await server.ended(await server.submit(f"fail {code}"))

    assert (job.status, job.attempts) == ("queued", 0)


async def test_a_job_that_comes_back_to_a_full_queue_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgld.server.jobs._NO_ROOM_S", 0.0)
    async with serving(tmp_path, is_killed=True) as server:
        job = await server.submit("hang")
    engine = FullForAWhile(num_refusals=2)
    async with serving(tmp_path, engine) as server:
        await server.running(job)

    assert len(engine.params) == 1


class FullForAWhile(FakeEngine):
    """An engine whose queue is full at first."""

    def __init__(self, num_refusals: int) -> None:
        super().__init__()
        self.num_refusals = num_refusals

    def generate(
        self, params: SamplingParams, *, inputs: InputPolicy, waited_s: float = 0.0, limits: Limits = NO_LIMITS
    ) -> Any:
        self.num_refusals -= 1
        if self.num_refusals >= 0:
            params = msgspec.structs.replace(params, prompt="refuse queue_full")
            events = FakeEngine().generate(params, inputs=inputs)
        else:
            events = super().generate(params, inputs=inputs)
        return events


async def test_a_cancelled_job_stays_so(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        job = await server.submit("hang")
        await server.engine.hanging.wait()
        await server.jobs.cancel(job)
        cancelled = await server.now(job)

        assert server.engine.ended == ["hang"]
    async with serving(tmp_path) as server:
        again = await server.now(job)

    assert cancelled.error is not None
    assert (cancelled.status, cancelled.error.code) == ("failed", "cancelled")
    assert again == cancelled


async def test_a_deleted_job_is_gone_with_its_work(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        running = await server.submit("hang", image_path=(data_url(png()),))
        await server.engine.hanging.wait()
        finished = await server.ended(await server.submit("a cat"))
        for job in (running, finished):
            await server.jobs.delete(job)

        assert server.engine.ended == ["a cat", "hang"]
        assert [await server.store.get(job.id) for job in (running, finished)] == [None, None]
    assert not left_in(tmp_path)


async def test_a_job_that_waits_for_others_after_a_restart_can_be_deleted(tmp_path: Path) -> None:
    async with serving(tmp_path, is_killed=True) as server:
        jobs = [await server.submit("hang", seed=seed) for seed in range(2)]
        for job in jobs:
            while (await server.now(job)).status != "in_progress":
                await anyio.lowlevel.checkpoint()
    async with serving(tmp_path) as server:
        await server.running(jobs[0])
        await server.jobs.delete(jobs[1])
        await server.jobs.cancel(jobs[0])

        assert await server.jobs.wait_running(jobs[1].id) is None
        assert [params.seed for params in server.engine.params] == [0]


async def test_the_same_key_is_the_same_job(tmp_path: Path) -> None:
    jobs: list[Job] = []
    async with serving(tmp_path) as server:
        async with anyio.create_task_group() as tasks:

            async def submit() -> None:
                jobs.append(await server.submit("a cat", key="k"))

            for _ in range(3):
                tasks.start_soon(submit)
        await server.ended(jobs[0])
    async with serving(tmp_path) as server:
        jobs.append(await server.submit("a cat", key="k"))

    assert len({job.id for job in jobs}) == 1
    assert server.engine.params == []


async def test_results_expire(tmp_path: Path) -> None:
    now = 1000.0
    async with serving(tmp_path, clock=lambda: now, result_ttl_s=100.0, result_max_bytes=2) as server:
        old = await server.ended(await server.submit("a cat"))
        assert server.jobs.expires_at(old) == 1100
        now = 1099.0
        newer = [await server.ended(await server.submit("a cat")) for _ in range(2)]
        await server.jobs.sweep()
        too_much = await server.store.get(old.id)
        now = 1200.0
        await server.submit("hang")
        await server.jobs.sweep()

        assert too_much is None
        assert [await server.store.get(job.id) for job in newer] == [None, None]
        assert len(await server.store.unfinished()) == 1
    assert not left_in(tmp_path)


async def test_files_of_a_request_that_is_no_job_expire_though_the_server_died_before_they_were_kept(
    tmp_path: Path,
) -> None:
    now, params = 1000.0, SamplingParams()
    file = StoredFile(key="img_1/0-0.png", media_type="image/png", width=1, height=1, seed=0, size_bytes=5)
    async with serving(tmp_path, clock=lambda: now, is_killed=True) as server:
        live = LiveRequest("img_1", "img", OWNER, params, finish=Writes(server.jobs, {}).finish)
        await server.jobs.announce(live, [file])
        await server.jobs.storage.put(file.key, b"12345", "image/png")
    assert left_in(tmp_path)
    async with serving(tmp_path, clock=lambda: now, result_ttl_s=100.0) as server:
        (died,) = await server.jobs.latest(9)
        await server.jobs.announce(other := LiveRequest("img_2", "img", OWNER, params, finish=live._finish), [file])
        await server.jobs.keep(other, [file])
        kept = (await server.jobs.latest(9))[-1]
        now = 1200.0
        await server.jobs.sweep()
    assert (died.status, died.error and died.error.code) == ("failed", "server_died")
    assert (kept.id, kept.status, kept.error) == ("img_2", "completed", None)
    assert not left_in(tmp_path)


async def test_a_disk_that_is_full_is_one_clear_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_args: Any, **_about: Any) -> None:
        raise OSError("the file of jobs can't be used: database or disk is full")

    monkeypatch.setattr(JobStore, "add", full)
    async with running(tmp_path) as server:
        answer = await server.http.post("/v1/videos", json={"prompt": "a cat", "num_frames": 5})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "storage_failed")
    assert "disk is full" in answer.json()["error"]["message"]
