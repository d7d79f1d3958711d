"""Finished requests: their files in the storage, and beside these a record of what they are."""

import msgspec

from sgld.storage import Storage

_RECORD = "result.json"


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a result."""

    key: str
    media_type: str
    width: int
    height: int
    seed: int


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A finished request."""

    id: str
    kind: str
    owner: str
    created_at: int
    prompt: str
    files: tuple[StoredFile, ...]


class Results:
    """Keeps records where their files are, so that several servers can share a storage."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    async def keep(self, record: Record) -> None:
        """Add a record, after its files.

        :raises OSError: it can't be stored.
        """
        await self.storage.put(f"{record.id}/{_RECORD}", msgspec.json.encode(record), "application/json")

    async def get(self, request_id: str, kind: str, owner: str) -> Record | None:
        """A record, if there is one and it is the owner's."""
        if not is_id(request_id, kind):
            return None
        content = await self.storage.read(f"{request_id}/{_RECORD}")
        record = msgspec.json.decode(content, type=Record) if content else None
        return record if record is not None and record.owner == owner else None

    async def delete(self, record: Record) -> None:
        """Remove a record and its files."""
        await self.storage.delete(record.id)


def is_id(text: str, kind: str) -> bool:
    """Whether this may be the id of a request: what isn't names no file."""
    prefix, _, digits = text.partition("_")
    return prefix == kind and len(digits) == 32 and digits.isalnum() and digits.isascii()
