"""SQLite files that survive kills and power failures, for one process at a time."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from anyio import CapacityLimiter
from anyio.to_thread import run_sync

from sgld.outcome import on_failure

T = TypeVar("T")
# A server that was told to leave may still be closing the file.
_LEAVE_S = 1.0


class Database:
    """A file, used by one thread at a time and never by that of the event loop.

    :param schema: its statements, which make a new file.
    :param name: what messages call it.
    :raises OSError: it can't be used; from its methods, too.
    """

    def __init__(self, path: Path, schema: str, version: int, name: str) -> None:
        self._limiter = CapacityLimiter(1)
        self._name = name
        try:
            self._connection = _open(path, schema, version)
        except sqlite3.Error as error:
            hint = (
                f"; another server uses {path.parent}, and each needs a folder of its own: choose one with --data-dir"
                if "locked" in str(error)
                else ""
            )
            raise OSError(f"the {name} in {path} can't be used: {error}{hint}") from None

    def close(self) -> None:
        """Let others use the file."""
        self._connection.close()

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What a function makes of the file, in a thread."""
        try:
            return await run_sync(work, self._connection, limiter=self._limiter)
        except sqlite3.Error as error:
            raise OSError(f"the file of {self._name} can't be used: {error}") from None


def _open(path: Path, schema: str, version: int) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=_LEAVE_S, isolation_level=None, check_same_thread=False)
    with on_failure(db.close):
        # Before WAL: then it needs no memory that processes share, and keeps others out.
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        # 4 ms for each commit on an ordinary disk, where NORMAL takes 0.01 and forgets the last ones with the power.
        db.execute("PRAGMA synchronous = FULL")
        db.execute("BEGIN IMMEDIATE")
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found == 0:
            for statement in schema.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {version}")
        elif found != version:
            raise sqlite3.DatabaseError(f"it has version {found}, this sgld knows {version}; move it away")
        db.execute("COMMIT")
    return db
