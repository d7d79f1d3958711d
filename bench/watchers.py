"""Those who watch in bench/load.py: many streams of /v1/events, read by one process that does little else.

All who watch get the same bytes, so each chunk is parsed once. What it says is checked for each of them.
"""

import selectors
import socket
import statistics
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf
from multiprocessing.connection import Connection
from typing import Any

import msgspec

PART_OF_SLOW = 0.04
# Slow readers read nothing for so long, then all that is there, and again.
SLOW_S = 8.0
READING_S = 1.0
TIMES = {
    "request.queued": "created_at",
    "request.started": "started_at",
    "request.completed": "ended_at",
    "server.stats": "time",
}
_BUFFER_BYTES = 2**20
_POLL_S = 0.2
# Delays are counted in tenths of a millisecond, so that hours take no more memory than minutes.
_PER_S = 10_000


@dataclass(frozen=True)
class Event:
    """What matters of an event."""

    name: str
    number: int
    data: dict[str, Any]
    time: float | None


@dataclass
class Findings:
    """What all of them heard: delays by event, and how often something was wrong."""

    delays: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in TIMES})
    slow_delays: Counter[int] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    num_events: int = 0
    cpu_s: float = 0.0


@dataclass(frozen=True)
class Ask:
    """What the bench tells this process: measure or don't; who lacks ends of these requests? and stop."""

    is_measuring: bool = False
    made: Collection[str] | None = None
    is_last: bool = False


@lru_cache(maxsize=512)
def parse(data: bytes) -> tuple[tuple[Event, ...], bytes]:
    """The events in a part of a stream, and the beginning of another one."""
    # Chunks of HTTP: their sizes stand in lines of their own, between events.
    *blocks, rest = data.split(b"\n\n")
    events = (_event(block[block.find(b"event: ") :]) for block in blocks if b"event: " in block)
    return tuple(events), rest


def _event(block: bytes) -> Event:
    fields = dict(line.split(": ", 1) for line in block.decode().splitlines() if ": " in line)
    name, data = fields["event"], msgspec.json.decode(fields["data"])
    return Event(name, int(fields["id"].rpartition("-")[2]) if "id" in fields else 0, data, data.get(TIMES.get(name)))


class Watcher:
    """One stream."""

    def __init__(self, address: tuple[str, int], is_slow: bool) -> None:
        self.is_slow = is_slow
        self.socket = socket.socket()
        if is_slow:
            # So small that the server feels it.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect(address)
        self.socket.sendall(b"GET /v1/events HTTP/1.1\r\nhost: localhost\r\n\r\n")
        self.socket.setblocking(False)
        self.ended: set[str] = set()
        self._rest = b""
        self._number = -1
        self._progress: dict[str, float] = {}
        self._started: set[str] = set()

    def read(self, buffer: memoryview, findings: Findings, is_measuring: bool) -> bool:
        """Take what is there; False if the connection has ended."""
        try:
            size = self.socket.recv_into(buffer)
        except BlockingIOError:
            return True
        now = time.time()
        events, self._rest = parse(self._rest + bytes(buffer[:size]))
        findings.num_events += len(events)
        for event in events:
            self._check(event, findings.problems)
            if event.time is not None and is_measuring:
                delays = findings.slow_delays if self.is_slow else findings.delays[event.name]
                delays[int(_PER_S * (now - event.time))] += 1
        return size > 0

    def _check(self, event: Event, problems: Counter[str]) -> None:
        if event.number and event.number <= self._number:
            problems["ids that don't increase"] += 1
        self._number = event.number or self._number
        if event.name == "snapshot":
            self.ended.update(status["id"] for status in event.data["requests"] if status["status"] == "completed")
        elif event.name.startswith("request."):
            self._follow(event.name, event.data, problems)

    def _follow(self, name: str, data: dict[str, Any], problems: Counter[str]) -> None:
        """Check the order of what is said of a request: begun once, going on, ended once."""
        request_id = data["id"]
        if request_id in self.ended:
            problems["events after an end"] += 1
        elif name == "request.completed":
            self.ended.add(request_id)
            self._progress.pop(request_id, None)
            self._started.discard(request_id)
        elif name in ("request.failed", "request.cancelled"):
            problems[name] += 1
        elif name == "request.queued":
            problems["queued late"] += request_id in self._progress or request_id in self._started
            self._progress[request_id] = 0.0
        elif name == "request.started":
            problems["started late"] += self._progress.get(request_id, 0.0) > 0 or request_id in self._started
            self._started.add(request_id)
        else:
            problems["progress backwards"] += data["progress"] < self._progress.get(request_id, 0.0)
            self._progress[request_id] = data["progress"]


def watch(address: tuple[str, int], count: int, pipe: Connection) -> None:
    """The process: `count` streams; answers each `Ask`, at last with the `Findings`."""
    watchers = [Watcher(address, index < count * PART_OF_SLOW) for index in range(count)]
    slow = [watcher for watcher in watchers if watcher.is_slow]
    findings, is_measuring, are_slow_reading, turn = Findings(), False, True, time.monotonic()
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        for watcher in watchers:
            selector.register(watcher.socket, selectors.EVENT_READ, watcher)
        pipe.send(None)
        while True:
            for key, _ in selector.select(_POLL_S):
                if key.data is not None:
                    if not key.data.read(buffer, findings, is_measuring):
                        findings.problems["connections lost"] += 1
                        selector.unregister(key.fileobj)
                        slow = [watcher for watcher in slow if watcher is not key.data]
                    continue
                ask: Ask = pipe.recv()
                if ask.is_last:
                    findings.cpu_s = time.process_time()
                    pipe.send(findings)
                    return
                is_measuring = ask.is_measuring
                if ask.made is not None:
                    # Nothing comes any more: now slow ones read what they have before them.
                    turn = inf if are_slow_reading else 0.0
                    pipe.send([len(set(ask.made) - watcher.ended) for watcher in watchers])
            if time.monotonic() >= turn:
                are_slow_reading = not are_slow_reading
                turn = time.monotonic() + (READING_S if are_slow_reading else SLOW_S)
                for watcher in slow:
                    if are_slow_reading:
                        selector.register(watcher.socket, selectors.EVENT_READ, watcher)
                    elif watcher.socket in selector.get_map():
                        selector.unregister(watcher.socket)


def spread(delays: Counter[int]) -> dict[str, float]:
    """Milliseconds."""
    if not delays:
        return {}
    ordered, total, at = sorted(delays), sum(delays.values()), {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    found: dict[str, float] = {}
    heard, wanted = 0, list(at.items())
    for delay in ordered:
        heard += delays[delay]
        while wanted and heard >= wanted[0][1] * total:
            found[wanted.pop(0)[0]] = round(1000 * delay / _PER_S, 1)
    return found


def growth(sizes: list[float]) -> float:
    """How much larger the last quarter is than the second one."""
    quarter = max(1, len(sizes) // 4)
    return statistics.median(sizes[-quarter:]) - statistics.median(sizes[quarter : 2 * quarter] or sizes)
