"""/v1/events and /v1/requests of a real server."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx2
import msgspec
import pytest

from sgld.server import watcher as watcher_module
from sgld.server.auth import ANYBODY
from sgld.server.events import _Reader

from .fakes import Running, running
from .test_images import error_of

NO_WAIT = {"wait": False}


@dataclass
class Events:
    """An event stream, read one by one."""

    response: httpx2.Response
    last_id: str | None = None
    _lines: AsyncIterator[str] = field(init=False)

    def __post_init__(self) -> None:
        self._lines = self.response.aiter_lines()

    async def next(self) -> tuple[str, dict[str, Any]]:
        """Name and data of the next event."""
        name, data = "", None
        async for line in self._lines:
            key, _, value = line.partition(": ")
            if key == "event":
                name = value
            elif key == "data":
                data = msgspec.json.decode(value)
            elif key == "id":
                self.last_id = value
            elif not line and data is not None:
                return name, data
        raise EOFError

    async def until(self, name: str) -> tuple[list[str], dict[str, Any]]:
        """The names of events up to one with this name, and its data."""
        names = []
        while True:
            found, data = await self.next()
            if found != "server.stats":
                names.append(found)
            if found == name:
                return names, data


@asynccontextmanager
async def listening(server: Running, path: str = "/v1/events", **headers: str) -> AsyncIterator[Events]:
    async with server.http.stream("GET", path, headers=headers) as response:
        assert response.headers.get("content-type", "").startswith("text/event-stream"), await response.aread()
        yield Events(response)


async def test_a_request_is_followed_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    async with running(tmp_path) as server, listening(server) as events:
        name, snapshot = await events.next()
        await server.post(prompt="a cat", seed=7, n=2, num_inference_steps=3)
        names, completed = await events.until("request.completed")

    assert (name, snapshot["requests"]) == ("snapshot", [])
    assert (snapshot["part"], snapshot["num_parts"], snapshot["server"]["model"]) == (0, 1, "sgld/tiny-image")
    assert names[0] == "request.queued"
    assert "request.started" in names
    assert completed["prompt"] == "a cat"
    assert completed["params"] == {"num_inference_steps": 3, "seed": 7, "n": 2}
    assert completed["progress"] == 1
    assert [output["seed"] for output in completed["outputs"]] == [7, 8]
    assert [output["urls"] for output in completed["outputs"]] == [
        [f"/v1/images/{completed['id']}/content?variant={number}"] for number in range(2)
    ]


async def test_who_does_not_wait_is_answered_at_once_and_finds_the_picture_later(tmp_path: Path) -> None:
    async with running(tmp_path) as server, listening(server) as events:
        answer = await server.post(prompt="wait", **NO_WAIT)
        server.engine.go.set()
        _, completed = await events.until("request.completed")
        picture = await server.http.get(completed["outputs"][0]["urls"][0])

    assert answer.status_code == 202
    assert answer.json()["id"] == completed["id"]
    assert answer.json()["status"] in ("queued", "running")
    assert answer.headers["location"] == f"/v1/requests/{completed['id']}"
    assert picture.headers["content-type"] == "image/png"


async def test_who_does_not_wait_can_not_have_a_stream(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        answer = await server.post(prompt="a cat", stream=True, **NO_WAIT)

    assert error_of(answer)["param"] == "wait"


async def test_who_comes_late_sees_all_in_a_snapshot(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        done = (await server.post(prompt="a cat")).json()["id"]
        hanging = (await server.post(prompt="hang", **NO_WAIT)).json()["id"]
        await server.engine.hanging.wait()
        async with listening(server) as events:
            _, snapshot = await events.next()

    assert [(r["id"], r["status"]) for r in snapshot["requests"]] == [(done, "completed"), (hanging, "running")]


async def test_who_comes_back_hears_what_was_missed(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        async with listening(server) as events:
            await events.next()
        assert events.last_id is not None
        await server.post(prompt="a cat")
        async with listening(server, **{"last-event-id": events.last_id}) as again:
            names, _ = await again.until("request.completed")
        async with listening(server, **{"last-event-id": again.last_id or ""}) as third:
            await server.post(prompt="a dog")
            _, completed = await third.until("request.completed")

    assert names == ["request.queued", "request.started", "request.completed"]
    assert completed["prompt"] == "a dog"


@pytest.mark.parametrize("last_id", ["0badf00d-3", "nonsense", "{epoch}-99999", "{epoch}-x"])
async def test_who_comes_back_with_an_id_of_no_use_gets_a_snapshot(tmp_path: Path, last_id: str) -> None:
    async with running(tmp_path) as server:
        given = last_id.format(epoch=server.services.feed.epoch)
        async with listening(server, **{"last-event-id": given}) as events:
            name, _ = await events.next()

    assert name == "snapshot"


async def test_a_snapshot_of_many_requests_comes_in_small_pieces(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        for _ in range(90):
            await server.post(prompt="x" * 1000, **NO_WAIT)
        await server.services.requests.wait_idle()
        async with listening(server) as events:
            pieces = [(await events.next())[1]]
            while pieces[-1]["part"] + 1 < pieces[-1]["num_parts"]:
                pieces.append((await events.next())[1])

    assert len(pieces) > 1
    assert max(len(msgspec.json.encode(piece)) for piece in pieces) < 64 * 1024
    assert sum(len(piece["requests"]) for piece in pieces) == 90


async def test_previews_come_as_small_pictures_and_are_at_their_url_while_the_request_runs(tmp_path: Path) -> None:
    async with running(tmp_path) as server, listening(server) as events:
        await server.post(prompt="show", num_previews=1, **NO_WAIT)
        _, preview = await events.until("request.preview")
        there = await server.http.get(preview["url"])
        server.engine.go.set()
        await events.until("request.completed")
        gone = await server.http.get(preview["url"])

    assert preview["data"].startswith("data:image/jpeg;base64,")
    assert preview["url"] == f"/v1/requests/{preview['id']}/preview?output=0&step=1"
    assert there.headers["content-type"] == "image/jpeg"
    assert there.content[:2] == b"\xff\xd8"
    assert gone.status_code == 404


async def test_a_stream_of_one_request_ends_with_it(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        request_id = (await server.post(prompt="wait", **NO_WAIT)).json()["id"]
        async with listening(server, f"/v1/requests/{request_id}/events") as events:
            _, snapshot = await events.next()
            await server.post(prompt="another", **NO_WAIT)
            server.engine.go.set()
            names, completed = await events.until("request.completed")
            with pytest.raises(EOFError):
                await events.next()
        async with listening(server, f"/v1/requests/{request_id}/events") as late:
            _, ended = await late.next()
            with pytest.raises(EOFError):
                await late.next()

    assert [r["id"] for r in snapshot["requests"]] == [request_id]
    assert "request.queued" not in names
    assert completed["id"] == request_id
    assert ended["requests"][0]["status"] == "completed"


async def test_a_stream_of_one_request_ends_when_its_end_is_only_in_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as server:
        request_id = (await server.post(prompt="wait", **NO_WAIT)).json()["id"]
        stream = _Reader(server.services, ANYBODY, request_id, watcher_module.EVENT_NAMES).read(
            None, ends_with_request=True
        )
        heard = await anext(stream)
        server.services.feed.announce_shutdown()
        while b"server.shutdown" not in heard:
            heard += await anext(stream)
        monkeypatch.setattr(watcher_module, "MAX_NEWS", 2)
        server.engine.go.set()
        await server.services.requests.wait_idle()
        for _ in range(3):
            await server.post(prompt="another")
        with anyio.fail_after(60):
            pieces = [piece async for piece in stream]

    assert b'"status":"completed"' in pieces[-1]
    assert pieces[-1].startswith(b"event: snapshot")


async def test_who_comes_back_to_a_request_that_is_over_hears_its_end_once(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        request_id = (await server.post(prompt="wait", **NO_WAIT)).json()["id"]
        path = f"/v1/requests/{request_id}/events"
        async with listening(server, path) as events:
            await events.next()
        server.engine.go.set()
        await server.services.requests.wait_idle()
        async with listening(server, path, **{"last-event-id": events.last_id or ""}) as again:
            names, _ = await again.until("request.completed")
            with pytest.raises(EOFError):
                await again.next()
        over = await server.http.get(path, headers={"last-event-id": again.last_id or ""})

    assert "snapshot" not in names
    assert over.status_code == 204


async def test_a_request_is_ended_by_delete(tmp_path: Path) -> None:
    async with running(tmp_path) as server, listening(server) as events:
        request_id = (await server.post(prompt="hang", **NO_WAIT)).json()["id"]
        await server.engine.hanging.wait()
        deleted = await server.http.delete(f"/v1/requests/{request_id}")
        _, cancelled = await events.until("request.cancelled")
        again = await server.http.delete(f"/v1/requests/{request_id}")
        gone = await server.http.get(f"/v1/requests/{request_id}")

    assert deleted.json() == {"id": request_id, "object": "request.deleted", "deleted": True}
    assert cancelled["id"] == request_id
    assert again.status_code == 200
    assert error_of(gone)["code"] == "not_found"


async def test_what_an_earlier_server_finished_is_still_shown(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        for prompt, n in (("a cat", 2), ("layers 3", 1)):
            await server.post(prompt=prompt, n=n, seed=7)
        await server.post(prompt="fail out_of_memory", **NO_WAIT)
        await server.services.requests.wait_idle()
        before = (await server.http.get("/v1/requests")).json()["data"]
    async with running(tmp_path) as server:
        after = (await server.http.get("/v1/requests")).json()["data"]
        found = [(await server.http.get(url)).status_code for r in after for o in r["outputs"] for url in o["urls"]]

    def told(requests: list[dict[str, Any]]) -> list[Any]:
        names = ("id", "kind", "status", "prompt", "params", "error")
        urls = {r["id"]: [o["urls"] for o in r["outputs"]] for r in requests}
        return sorted([r["id"], *(r[name] for name in names), urls[r["id"]]] for r in requests)

    assert told(after) == told(before)
    assert found == [200] * 5


async def test_what_was_cancelled_does_not_come_back(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        request_id = (await server.post(prompt="hang", **NO_WAIT)).json()["id"]
        await server.engine.hanging.wait()
        await server.http.delete(f"/v1/requests/{request_id}")
        await server.services.requests.wait_idle()
    async with running(tmp_path) as server:
        (status,) = (await server.http.get("/v1/requests")).json()["data"]

    assert (status["status"], status["error"]) == ("cancelled", None)
    assert server.engine.params == []


async def test_requests_are_listed_newest_first(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        ids = [(await server.post(prompt=prompt)).json()["id"] for prompt in ("a", "b", "c")]
        await server.post(prompt="fail out_of_memory")
        some = (await server.http.get("/v1/requests?limit=2&status=completed")).json()
        failed = (await server.http.get("/v1/requests?status=failed")).json()
        one = (await server.http.get(f"/v1/requests/{ids[0]}")).json()

    assert [r["id"] for r in some["data"]] == [ids[2], ids[1]]
    assert some["has_more"]
    assert failed["data"][0]["error"] == {"code": "out_of_memory", "message": "it broke"}
    assert one["id"] == ids[0]


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/requests?limit=0", "limit"),
        ("/v1/requests?limit=x", "limit"),
        (f"/v1/requests?limit={'1' * 5000}", "limit"),
        ("/v1/requests?status=done", "status"),
        ("/v1/events?types=request.finished", "types"),
    ],
)
async def test_what_can_not_be_asked_for_is_said(tmp_path: Path, path: str, param: str) -> None:
    async with running(tmp_path) as server:
        answer = await server.http.get(path)

    assert answer.status_code == 400
    assert error_of(answer)["param"] == param


async def test_who_does_not_read_delays_no_step_and_hears_every_end(tmp_path: Path) -> None:
    """A client that stops reading until 40 requests are over: more than its connection holds."""
    async with running(tmp_path, send_buffer_bytes=4096) as server:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(b"GET /v1/events HTTP/1.1\r\nhost: localhost\r\n\r\n")
        slow.setblocking(False)
        with slow:
            heard = await read_until(slow, b"event: snapshot")
            async with listening(server) as events:
                await events.next()
                made = []
                for _ in range(40):
                    answer = await server.post(prompt="x" * 600, n=4, size="8x8")
                    made.append(answer.json()["id"])
                told = [await events.until("request.completed") for _ in made]
            heard += await read_until(slow, f"id: {events.last_id}\n".encode())
    body = re.sub(rb"\r\n[0-9a-f]+\r\n", b"", heard)
    numbers = [int(number) for number in re.findall(rb"\nid: \w+-(\d+)\n", body)]
    ends = [e.decode() for e in re.findall(rb'event: request\.completed\nid: [^\n]+\ndata: {"id":"(\w+)"', body)]

    assert [completed["id"] for _, completed in told] == made
    assert ends == made
    assert numbers == sorted(set(numbers))
    # What was outdated when it read on wasn't told.
    assert sum(len(names) for names, _ in told) > len(numbers)


async def read_until(connection: socket.socket, mark: bytes) -> bytes:
    """All that comes, up to where the mark has been seen."""
    loop, found = asyncio.get_running_loop(), b""
    while mark not in found:
        found += await loop.sock_recv(connection, 2**16)
    return found


async def test_only_events_that_are_asked_for_come(tmp_path: Path) -> None:
    async with running(tmp_path) as server, listening(server, "/v1/events?types=request.completed") as events:
        await events.next()
        await server.post(prompt="a cat")
        name, _ = await events.next()

    assert name == "request.completed"


async def test_each_key_hears_of_its_own_requests_only(tmp_path: Path) -> None:
    async with running(tmp_path, api_key=("one", "two")) as server:
        mine, yours = {"authorization": "Bearer one"}, {"authorization": "Bearer two"}
        async with listening(server, **yours) as events:
            await events.next()
            body = {"prompt": "mine", **NO_WAIT}
            answer = await server.http.post("/v1/images/generations", json=body, headers=mine)
            await server.http.post("/v1/images/generations", json={"prompt": "yours"}, headers=yours)
            _, completed = await events.until("request.completed")
        path = f"/v1/requests/{answer.json()['id']}"
        seen = [(await server.http.get(path, headers=headers)).status_code for headers in (mine, yours)]

    assert completed["prompt"] == "yours"
    assert seen == [200, 404]


async def test_who_watches_is_told_when_the_server_leaves(tmp_path: Path) -> None:
    async with running(tmp_path, shutdown_timeout_s=20) as server, listening(server) as events:
        await server.post(prompt="wait", **NO_WAIT)
        await server.engine.hanging.wait()
        server.services.stopping.set()
        names, _ = await events.until("server.shutdown")
        server.engine.go.set()
        rest, _ = await events.until("request.completed")
        with pytest.raises(EOFError):
            await events.next()

    assert "request.completed" not in names
    assert rest[-1] == "request.completed"


async def test_probes_of_its_health_are_not_shown(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        await server.http.get("/health_generate")
        listed = (await server.http.get("/v1/requests")).json()

    assert listed["data"] == []


async def test_stats_come_every_second(tmp_path: Path) -> None:
    async with running(tmp_path) as server, listening(server, "/v1/events?types=server.stats") as events:
        await events.next()
        name, stats = await events.next()

    assert name == "server.stats"
    assert stats["num_queued"] == 0
