"""JSON with large files inside."""

import json
import os
from base64 import b64decode

import msgspec
import pytest

from sgld.server.inlined import PIECE_BYTES, json_with


class Item(msgspec.Struct, omit_defaults=True):
    seed: int
    b64: bytes | None = None


class Body(msgspec.Struct):
    items: list[Item]
    said: str


async def sent(body: Body, contents: list[bytes]) -> list[bytes]:
    """The pieces of the body, as a server sends them."""
    response = json_with(body, "b64", contents)
    pieces = [bytes(piece) async for piece in response.body_iterator]  # type: ignore[arg-type]
    assert response.headers["content-length"] == str(sum(map(len, pieces)))
    assert response.headers["content-type"] == "application/json"
    return pieces


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, 2 * PIECE_BYTES + 2])
async def test_files_are_whole_whatever_their_size(size: int) -> None:
    contents = [os.urandom(size), b"second", b""]
    body = Body([Item(seed, b"") for seed in range(3)], 'and then "b64":""')
    pieces = await sent(body, contents)
    answer = json.loads(b"".join(pieces))
    assert [b64decode(item["b64"], validate=True) for item in answer["items"]] == contents
    assert answer["items"][2]["seed"] == 2
    assert answer["said"] == 'and then "b64":""'
    assert max(map(len, pieces)) <= 4 * PIECE_BYTES // 3


async def test_without_files_it_is_plain_json() -> None:
    body = Body([Item(1)], "nothing")
    assert await sent(body, []) == [msgspec.json.encode(body)]
