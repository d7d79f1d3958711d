"""The exact bytes of streams, and what slow and leaving readers do."""

import asyncio
import re
import socket
from pathlib import Path

import anyio
import pytest

from sgld.server import sse

from .fakes import FakeEngine, Running, running


async def connect(server: Running, body: bytes) -> anyio.abc.SocketStream:
    """A connection on which pictures were asked for."""
    stream = await anyio.connect_tcp("127.0.0.1", server.port)
    head = (
        "POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    await stream.send(head.encode() + body)
    return stream


async def read_until(stream: anyio.abc.SocketStream, mark: bytes) -> bytes:
    found = b""
    while mark not in found:
        found += await stream.receive()
    return found


def unchunked(raw: bytes) -> bytes:
    """The body of an answer in chunks."""
    body, rest = b"", raw
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return body


async def test_the_bytes_of_a_stream(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        body = b'{"prompt":"a","stream":true,"partial_images":1,"size":"8x8","seed":1,"metadata":false}'
        stream = await connect(server, body)
        async with stream:
            raw = await read_until(stream, b"0\r\n\r\n")

    head, _, chunked = raw.partition(b"\r\n\r\n")
    assert b"HTTP/1.1 200" in head
    assert b"content-type: text/event-stream; charset=utf-8" in head
    assert b"cache-control: no-cache, no-transform" in head
    assert b"x-accel-buffering: no" in head
    pattern = (
        rb"event: image_generation\.partial_image\n"
        rb'data: \{"type":"image_generation\.partial_image","b64_json":"[\w+/=]+","partial_image_index":0,'
        rb'"created_at":\d+,"size":"6x4","quality":"auto","background":"opaque","output_format":"png","index":0\}\n\n'
        rb"event: image_generation\.completed\n"
        rb'data: \{"type":"image_generation\.completed","b64_json":"[\w+/=]+","created_at":\d+,"size":"8x8",'
        rb'"quality":"auto","background":"opaque","output_format":"png","usage":\{"input_tokens":0,'
        rb'"input_tokens_details":\{"image_tokens":0,"text_tokens":0\},"output_tokens":0,"total_tokens":0\},'
        rb'"index":0,"seed":1,"id":"img_[0-9a-f]{32}","upload":null\}\n\n'
    )
    assert re.fullmatch(pattern, unchunked(chunked))


async def test_an_error_ends_a_stream(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        stream = await connect(server, b'{"prompt":"fail out_of_memory","stream":true}')
        async with stream:
            raw = await read_until(stream, b"0\r\n\r\n")

    assert unchunked(raw.partition(b"\r\n\r\n")[2]) == (
        b"event: error\n"
        b'data: {"error":{"message":"it broke","type":"server_error","param":null,"code":"out_of_memory"}}\n\n'
    )


async def test_heartbeats_are_comments_without_a_blank_line(tmp_path: Path) -> None:
    async with running(tmp_path, heartbeat_s=0.01) as server:
        stream = await connect(server, b'{"prompt":"wait","stream":true}')
        async with stream:
            raw = await read_until(stream, b": ping\n\r\n7\r\n: ping\n")
            server.engine.go.set()
            raw += await read_until(stream, b"0\r\n\r\n")

    body = unchunked(raw.partition(b"\r\n\r\n")[2])
    assert re.fullmatch(rb"(: ping\n)+event: image_generation\.completed\ndata: .*\n\n(: ping\n)*", body)


async def test_who_does_not_read_holds_up_nobody(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as server:
        # More than sockets and buffers hold.
        body = b'{"prompt":"a","stream":true,"n":4,"size":"4000x4000","output_format":"png","metadata":false}'
        stream = await connect(server, body)
        async with stream:
            await engine.has_ended.wait()
            answer = await server.post(prompt="a cat")

    assert answer.status_code == 200


@pytest.mark.parametrize("is_stream", [b"true", b"false"])
async def test_who_leaves_stops_the_work(tmp_path: Path, is_stream: bytes) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as server:
        stream = await connect(server, b'{"prompt":"hang","stream":' + is_stream + b"}")
        await engine.hanging.wait()
        await stream.aclose()
        await engine.has_ended.wait()

        assert (await server.http.get("/liveness")).status_code == 200


async def test_steps_are_told_to_who_asks(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        body = {"prompt": "a", "stream": True, "progress_events": True, "num_inference_steps": 2}
        text = (await server.http.post("/v1/images/generations", json=body)).text

    assert '"step":2,"num_steps":2' in text


async def test_who_takes_nothing_for_too_long_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "_SEND_TIMEOUT_S", 0.05)
    async with running(tmp_path, heartbeat_s=0.01, send_buffer_bytes=4096) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(b"GET /v1/events HTTP/1.1\r\nhost: localhost\r\n\r\n")
        connection.setblocking(False)
        with connection:
            assert await asyncio.get_running_loop().sock_recv(connection, 1)
            while server.services.feed.num_watchers:
                await server.post(prompt="x" * 600, n=4, size="8x8")
        answer = await server.post(prompt="a cat")

    assert answer.status_code == 200
