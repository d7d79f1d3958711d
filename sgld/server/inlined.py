"""JSON with large files inside, in base64: made piece by piece while it is sent.

Base64 of 12 MB holds up the event loop for ten milliseconds from whatever thread makes it, as it keeps the interpreter
to itself. In pieces nothing waits long for any of them, the client reads while the next is made, and they are never all
there at once.
"""

from binascii import b2a_base64
from collections.abc import AsyncGenerator, Sequence
from functools import partial

import msgspec
from anyio.to_thread import run_sync
from starlette.responses import StreamingResponse

# A multiple of 3, so that the base64 of all pieces is that of the whole. Takes a millisecond.
PIECE_BYTES = 3 * 2**18


def json_with(body: msgspec.Struct, field: str, contents: Sequence[bytes]) -> StreamingResponse:
    """`body` as JSON in which the empty values of a field are the contents, in this order."""
    opening = f'"{field}":"'.encode()
    # Nothing else looks like it: quotes inside of strings are escaped.
    between = msgspec.json.encode(body).split(opening + b'"')
    assert len(between) == len(contents) + 1, f"{len(contents)} values of {field} are empty"
    texts = [text + opening for text in between[:-1]] + between[-1:]
    texts[1:] = [b'"' + text for text in texts[1:]]

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield texts[0]
        for content, text in zip(contents, texts[1:], strict=True):
            for start in range(0, len(content), PIECE_BYTES):
                yield await run_sync(partial(b2a_base64, content[start : start + PIECE_BYTES], newline=False))
            yield text

    length = sum(map(len, texts)) + sum(4 * -(-len(content) // 3) for content in contents)
    return StreamingResponse(pieces(), media_type="application/json", headers={"content-length": str(length)})
