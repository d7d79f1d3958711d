"""Jobs in an SQLite file: what was asked, how far it is, what came of it.

What was committed is there after the process was killed, and after a power failure.
"""

import sqlite3
from pathlib import Path
from typing import Any, Literal

import msgspec

from sgld.sampling_params import SamplingParams
from sgld.storage.database import Database

Status = Literal["queued", "in_progress", "completed", "failed"]
_VERSION = 1
_SCHEMA = """
CREATE TABLE job (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    owner TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    status TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    asked BLOB NOT NULL,
    files BLOB NOT NULL,
    error BLOB,
    completed_at INTEGER,
    size_bytes INTEGER NOT NULL,
    idempotency_key TEXT,
    body_hash TEXT,
    UNIQUE (owner, idempotency_key)
) STRICT;
CREATE INDEX job_of_owner ON job (owner, kind, number);
"""
_UNFINISHED = "status IN ('queued', 'in_progress')"
_COLUMNS = "id, kind, owner, created_at, status, attempts, asked, files, error, completed_at"


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a result."""

    key: str
    media_type: str
    width: int
    height: int
    seed: int
    size_bytes: int
    num_frames: int = 1
    fps: float | None = None


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked: enough to do it again.

    `options` are the fields of the API that aren't sampling params.
    """

    params: SamplingParams
    options: dict[str, Any] = {}
    model_path: str
    remixed_from: str | None = None


class JobError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job failed."""

    code: str
    message: str


UNSTORED = JobError(code="server_died", message="the server died while it stored the result")
"""Of a request whose files are being stored: it is completed next, unless the server dies."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job as it is in the file; `attempts` counts how often it was begun and not put back."""

    id: str
    kind: str
    owner: str
    created_at: int
    status: Status = "queued"
    attempts: int = 0
    asked: Asked
    files: tuple[StoredFile, ...] = ()
    error: JobError | None = None
    completed_at: int | None = None

    @property
    def is_finished(self) -> bool:
        return self.status in ("completed", "failed")


class KeyReused(Exception):
    """An Idempotency-Key was used before, for something else."""


class JobStore:
    """The file, which only one process may use.

    :raises OSError: it can't be used; from its methods, too.
    """

    def __init__(self, path: Path) -> None:
        self._database = Database(path, _SCHEMA, _VERSION, "jobs")

    def close(self) -> None:
        """Let others use the file."""
        self._database.close()

    async def add(self, job: Job, *, key: str | None = None, body_hash: str | None = None) -> None:
        """Add a job; its owner must have none with this key."""
        await self._database.run(lambda db: _insert(db, job, key, body_hash))

    async def find(self, owner: str, key: str, body_hash: str | None) -> Job | None:
        """The owner's job with this key.

        :raises KeyReused: it has another body.
        """
        return await self._database.run(lambda db: _find(db, owner, key, body_hash))

    async def get(self, job_id: str) -> Job | None:
        """A job."""
        rows = await self._select("WHERE id = ?", job_id)
        return rows[0] if rows else None

    async def page(self, owner: str, kind: str, *, after: str | None, limit: int, is_newest_first: bool) -> list[Job]:
        """Jobs of an owner after one of them, in the order in which they came or the reverse; none if it is gone."""
        sign, direction = ("<", "DESC") if is_newest_first else (">", "ASC")
        cursor = f"AND number {sign} (SELECT number FROM job WHERE id = ? AND owner = ?)" if after else ""
        condition = f"WHERE owner = ? AND kind = ? {cursor} ORDER BY number {direction} LIMIT ?"
        return await self._select(condition, owner, kind, *((after, owner) if after else ()), limit)

    async def latest(self, limit: int) -> list[Job]:
        """Of all owners those that have an end, the last ones, in the order in which they ended."""
        condition = f"WHERE NOT {_UNFINISHED} ORDER BY completed_at DESC, number DESC LIMIT ?"
        return (await self._select(condition, limit))[::-1]

    async def unfinished(self) -> list[Job]:
        """All that have no end yet, in the order in which they came."""
        return await self._select(f"WHERE {_UNFINISHED} ORDER BY number")

    async def start(self, job_id: str) -> None:
        """A job is begun."""
        await self._update(job_id, "status = 'in_progress', attempts = attempts + 1", "queued")

    async def put_back(self, job_id: str, *, is_to_blame: bool) -> None:
        """A job that was begun waits again.

        :param is_to_blame: its attempt counts.
        """
        attempts = "attempts" if is_to_blame else "attempts - 1"
        await self._update(job_id, f"status = 'queued', attempts = {attempts}", "in_progress")

    async def complete(self, job: Job) -> None:
        """Keep a job with its files, or the files of one that is there and unfinished or being stored."""
        await self._database.run(lambda db: _complete(db, job))

    async def fail(self, job_id: str, error: JobError, now: int) -> None:
        """End a job that is unfinished."""
        values = (msgspec.json.encode(error), now)
        await self._update(
            job_id, "status = 'failed', error = ?, completed_at = ?", "queued", "in_progress", values=values
        )

    async def delete(self, job_id: str) -> None:
        """Forget a job."""
        await self._database.run(lambda db: db.execute("DELETE FROM job WHERE id = ?", (job_id,)))

    async def expired(self, *, ended_before: int | None, max_bytes: int | None) -> list[Job]:
        """Finished jobs that ended before this time, or whose files with those of later ones exceed so many bytes."""
        newer = (
            "SELECT id, completed_at, sum(size_bytes) OVER (ORDER BY completed_at DESC, number DESC) AS total FROM job"
        )
        expired = f"SELECT id FROM ({newer} WHERE NOT {_UNFINISHED}) WHERE completed_at < ? OR total > ?"
        return await self._select(f"WHERE id IN ({expired})", ended_before, max_bytes)

    async def _select(self, condition: str, *values: Any) -> list[Job]:
        query = f"SELECT {_COLUMNS} FROM job {condition}"
        return await self._database.run(lambda db: [_job(row) for row in db.execute(query, values)])

    async def _update(self, job_id: str, changes: str, *states: Status, values: tuple[Any, ...] = ()) -> None:
        """Change a job that is in one of these states."""
        query = f"UPDATE job SET {changes} WHERE id = ? AND status IN ({', '.join('?' for _ in states)})"
        await self._database.run(lambda db: db.execute(query, (*values, job_id, *states)))


def _find(db: sqlite3.Connection, owner: str, key: str, body_hash: str | None) -> Job | None:
    query = f"SELECT {_COLUMNS}, body_hash FROM job WHERE owner = ? AND idempotency_key = ?"
    row = db.execute(query, (owner, key)).fetchone()
    if row is not None and row[-1] != body_hash:
        raise KeyReused
    return _job(row[:-1]) if row is not None else None


def _insert(db: sqlite3.Connection, job: Job, key: str | None = None, body_hash: str | None = None) -> None:
    size_bytes = sum(file.size_bytes for file in job.files)
    values = [getattr(job, name) for name in _COLUMNS.split(", ")]
    values = [msgspec.json.encode(v) if isinstance(v, Asked | JobError | tuple) else v for v in values]
    query = f"INSERT INTO job ({_COLUMNS}, size_bytes, idempotency_key, body_hash) VALUES ({', '.join('?' * 13)})"
    db.execute(query, (*values, size_bytes, key, body_hash))


def _complete(db: sqlite3.Connection, job: Job) -> None:
    files, size_bytes = msgspec.json.encode(job.files), sum(file.size_bytes for file in job.files)
    changes = "status = 'completed', files = ?, size_bytes = ?, completed_at = ?"
    is_there = db.execute("SELECT 1 FROM job WHERE id = ?", (job.id,)).fetchone() is not None
    if is_there:
        query = f"UPDATE job SET {changes}, error = NULL WHERE id = ? AND ({_UNFINISHED} OR error = ?)"
        db.execute(query, (files, size_bytes, job.completed_at, job.id, msgspec.json.encode(UNSTORED)))
    else:
        _insert(db, job)


def _job(row: tuple[Any, ...]) -> Job:
    job_id, kind, owner, created_at, status, attempts, asked, files, error, completed_at = row
    return Job(
        id=job_id,
        kind=kind,
        owner=owner,
        created_at=created_at,
        status=status,
        attempts=attempts,
        asked=msgspec.json.decode(asked, type=Asked),
        files=msgspec.json.decode(files, type=tuple[StoredFile, ...]),
        error=msgspec.json.decode(error, type=JobError) if error else None,
        completed_at=completed_at,
    )
