"""Jobs in their file."""

from pathlib import Path
from typing import Any

import pytest

from sgld.sampling_params import SamplingParams
from sgld.server.job_store import Asked, Job, JobError, JobStore, KeyReused, StoredFile

ERROR = JobError(code="out_of_memory", message="too large")


def job(number: int = 0, **fields: Any) -> Job:
    asked = Asked(params=SamplingParams(prompt="a cat"), options={"n": 1}, model_path="m")
    given: dict[str, Any] = {"id": f"video_{number}", "kind": "video", "owner": "me", "created_at": 5, "asked": asked}
    return Job(**given | fields)


def completed(number: int, size_bytes: int = 10, completed_at: int = 7, **fields: Any) -> Job:
    file = StoredFile(key="k", media_type="video/mp4", width=2, height=3, seed=4, size_bytes=size_bytes, fps=8.0)
    return job(number, status="completed", files=(file,), completed_at=completed_at, **fields)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    store = JobStore(tmp_path / "jobs.sqlite3")
    yield store
    store.close()


async def test_a_job_is_read_as_it_was_written(store: JobStore) -> None:
    await store.add(job())
    await store.add(completed(1))

    assert await store.get("video_0") == job()
    assert await store.get("video_1") == completed(1)
    assert await store.get("video_2") is None


async def test_what_was_written_is_there_when_the_file_is_opened_again(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite3")
    await store.add(job())
    store.close()
    store = JobStore(tmp_path / "jobs.sqlite3")
    found = await store.get("video_0")
    store.close()

    assert found == job()


async def test_two_servers_dont_share_a_file(store: JobStore, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="--data-dir"):
        JobStore(tmp_path / "jobs.sqlite3")


def test_what_is_no_file_of_jobs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite3").write_bytes(b"x" * 5000)

    with pytest.raises(OSError, match="not a database"):
        JobStore(tmp_path / "jobs.sqlite3")


async def test_attempts_count_unless_a_job_is_put_back_in_order(store: JobStore) -> None:
    await store.add(job())
    await store.start("video_0")
    started = await store.get("video_0")
    await store.put_back("video_0", is_to_blame=False)
    in_order = await store.get("video_0")
    await store.start("video_0")
    await store.put_back("video_0", is_to_blame=True)
    blamed = await store.get("video_0")

    assert started == job(status="in_progress", attempts=1)
    assert in_order == job()
    assert blamed == job(attempts=1)


async def test_an_end_is_final(store: JobStore) -> None:
    await store.add(job(0))
    await store.fail("video_0", ERROR, 9)
    await store.complete(completed(0))
    await store.put_back("video_0", is_to_blame=False)
    await store.start("video_0")
    await store.add(job(1))
    await store.complete(completed(1))
    await store.fail("video_1", ERROR, 9)

    assert await store.get("video_0") == job(0, status="failed", error=ERROR, completed_at=9)
    assert await store.get("video_1") == completed(1)
    assert await store.unfinished() == []


async def test_a_completed_request_that_was_no_job_becomes_one(store: JobStore) -> None:
    await store.complete(completed(3))

    assert await store.get("video_3") == completed(3)


async def test_pages_have_an_order_and_a_cursor(store: JobStore) -> None:
    for number in range(4):
        await store.add(job(number))
    await store.add(job(9, owner="you"))
    await store.add(job(8, kind="img"))

    async def ids(after: str | None, *, is_newest_first: bool, limit: int = 2, owner: str = "me") -> list[str]:
        page = await store.page(owner, "video", after=after, limit=limit, is_newest_first=is_newest_first)
        return [job.id for job in page]

    assert await ids(None, is_newest_first=True) == ["video_3", "video_2"]
    assert await ids("video_2", is_newest_first=True) == ["video_1", "video_0"]
    assert await ids("video_1", is_newest_first=False, limit=9) == ["video_2", "video_3"]
    assert await ids("video_9", is_newest_first=False) == []
    assert await ids(None, is_newest_first=False, owner="you") == ["video_9"]


async def test_a_key_stands_for_one_job_of_its_owner(store: JobStore) -> None:
    await store.add(job(0), key="k", body_hash="a")
    await store.add(job(1, owner="you"), key="k", body_hash="b")

    assert await store.find("me", "k", "a") == job(0)
    assert await store.find("me", "l", "a") is None
    with pytest.raises(KeyReused):
        await store.find("me", "k", "b")
    await store.delete("video_0")
    assert await store.find("me", "k", "a") is None


async def test_expired_is_what_ended_before_and_what_is_too_much(store: JobStore) -> None:
    for number in range(4):
        await store.add(completed(number, size_bytes=10, completed_at=10 + number))
    await store.add(job(9))

    async def expired(ended_before: int | None, max_bytes: int | None) -> list[str]:
        return [job.id for job in await store.expired(ended_before=ended_before, max_bytes=max_bytes)]

    assert await expired(None, None) == []
    assert await expired(12, None) == ["video_0", "video_1"]
    assert await expired(None, 30) == ["video_0"]
    assert await expired(None, 0) == ["video_0", "video_1", "video_2", "video_3"]
