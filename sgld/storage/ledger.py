"""Which files are in a bucket, which are on their way, and which are to go: it outlives the process."""

from pathlib import Path
from typing import Any, Literal

import msgspec

from sgld.storage.database import Database

State = Literal["pending", "stored", "deleting"]
_VERSION = 1
_SCHEMA = """
CREATE TABLE object (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE,
    folder TEXT NOT NULL,
    name TEXT NOT NULL,
    media_type TEXT NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL
) STRICT;
CREATE INDEX object_of_folder ON object (folder);
"""
_COLUMNS = "number, key, name, media_type, state, attempts"


class Entry(msgspec.Struct, frozen=True):
    """A file: its key here, the name of its object, and how far it is.

    A file that takes the place of another one has another `number`. `attempts` counts those that failed.
    """

    number: int
    key: str
    name: str
    media_type: str
    state: State
    attempts: int


class Ledger:
    """The file of entries.

    :raises OSError: it can't be used; from its methods, too.
    """

    def __init__(self, path: Path) -> None:
        self._database = Database(path, _SCHEMA, _VERSION, "uploads")

    def close(self) -> None:
        """Let others use the file."""
        self._database.close()

    async def add(self, key: str, name: str, media_type: str) -> Entry:
        """A file is to be uploaded, in place of one that was there."""
        folder = key.partition("/")[0]
        query = "INSERT OR REPLACE INTO object (key, folder, name, media_type, state, attempts)"
        values = (key, folder, name, media_type)
        query = f"{query} VALUES (?, ?, ?, ?, 'pending', 0)"
        number = await self._database.run(lambda db: db.execute(query, values).lastrowid)
        assert number is not None, "an inserted row has a number"
        return Entry(number, key, name, media_type, "pending", 0)

    async def get(self, key: str) -> Entry | None:
        """What is known of a file."""
        found = await self._select("WHERE key = ?", key)
        return found[0] if found else None

    async def unsettled(self) -> list[Entry]:
        """Those on their way, to the bucket or out of it; what failed most comes last."""
        return await self._select("WHERE state != 'stored' ORDER BY attempts, number")

    async def count_unsettled(self) -> int:
        """How many these are."""
        query = "SELECT count(*) FROM object WHERE state != 'stored'"
        return int(await self._database.run(lambda db: db.execute(query).fetchone()[0]))

    async def settle(self, entry: Entry) -> bool:
        """A file is in the bucket; False if nobody wants it there any more, or another one in its place."""
        query = "UPDATE object SET state = 'stored' WHERE number = ? AND state = 'pending'"
        return await self._database.run(lambda db: db.execute(query, (entry.number,)).rowcount == 1)

    async def failed(self, entry: Entry) -> None:
        """An attempt failed."""
        query = "UPDATE object SET attempts = attempts + 1 WHERE number = ?"
        await self._database.run(lambda db: db.execute(query, (entry.number,)))

    async def doom(self, folder: str) -> list[Entry]:
        """All objects of a folder are to go: these."""
        query = "UPDATE object SET state = 'deleting', attempts = 0 WHERE folder = ?"
        await self._database.run(lambda db: db.execute(query, (folder,)))
        return await self._select("WHERE folder = ?", folder)

    async def drop(self, entry: Entry) -> None:
        """Forget a file."""
        await self._database.run(lambda db: db.execute("DELETE FROM object WHERE number = ?", (entry.number,)))

    async def _select(self, condition: str, *values: Any) -> list[Entry]:
        query = f"SELECT {_COLUMNS} FROM object {condition}"
        return await self._database.run(lambda db: [Entry(*row) for row in db.execute(query, values)])
