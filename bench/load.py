"""Does everybody who watches a busy server hear all of it, in order and at once, while some don't listen?

python bench/load.py [--seconds 600] [--num-subscribers 500] [--num-generations 64] [--max-p99-ms 100]
    [--note TEXT] [--no-write]

`sgld serve` with the small model that ships, in processes of its own; clients on loopback in this one: subscribers of
/v1/events, of which some stop reading again and again, and generations that follow each other. Delays are from the
time that the server gives an event (`created_at`, `started_at`, `ended_at`) to the time when a client has read it.
Writes bench/results/load.md and load.json, and ends with code 1 if something isn't as it should be.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import psutil  # type: ignore[import-untyped]

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
# 64x64 with few steps: as many events as this machine can make.
BODY = {
    "prompt": "a red circle",
    "size": "64x64",
    "num_inference_steps": 4,
    "diffusers_kwargs": {"use_resolution_binning": False},
}
PART_OF_SLOW = 0.04
# Slow readers read nothing for so long, then all that is there, and again.
SLOW_S = 8.0
RAMP_S = 5.0
TIMEOUT_S = 60.0
TIMES = {
    "request.queued": "created_at",
    "request.started": "started_at",
    "request.completed": "ended_at",
    "server.stats": "time",
}


@dataclass(frozen=True)
class Event:
    """What matters of an event."""

    name: str
    number: int | None
    data: dict[str, Any]
    time: float | None


@lru_cache(maxsize=4096)
def parse(block: bytes) -> Event | None:
    """An event of a stream, or None for a comment; all subscribers get the same bytes."""
    fields = dict(line.split(": ", 1) for line in block.decode().splitlines() if not line.startswith(":"))
    if "data" not in fields:
        return None
    data, number = msgspec.json.decode(fields["data"]), fields.get("id", "").rpartition("-")[2]
    name = fields["event"]
    return Event(name, int(number) if number else None, data, data.get(TIMES.get(name, "")))


@dataclass
class Findings:
    """What all subscribers heard."""

    delays: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in TIMES})
    slow_delays: list[float] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)
    num_events: int = 0
    is_measuring: bool = False


class Subscriber(asyncio.Protocol):
    """One who watches /v1/events."""

    def __init__(self, findings: Findings, is_slow: bool) -> None:
        self.is_slow = is_slow
        self.ended: set[str] = set()
        self.transport: asyncio.Transport
        self._findings = findings
        self._has_left = False
        self._rest = b""
        self._number = -1
        self._progress: dict[str, float] = {}
        self._started: set[str] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(b"GET /v1/events HTTP/1.1\r\nhost: localhost\r\n\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        self._findings.problems["connections lost"] += not self._has_left

    def leave(self) -> None:
        """Hear no more."""
        self._has_left = True
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        # Chunks of HTTP: their sizes stand in lines of their own, between events.
        *blocks, self._rest = (self._rest + data).split(b"\n\n")
        now = time.time()
        for block in blocks:
            start = block.find(b"event: ")
            if start >= 0 and (event := parse(block[start:])) is not None:
                self._hear(event, now)

    def _hear(self, event: Event, now: float) -> None:
        self._findings.num_events += 1
        if event.number is not None:
            if event.number <= self._number:
                self._findings.problems["ids that don't increase"] += 1
            self._number = event.number
        if event.name == "snapshot":
            self.ended.update(status["id"] for status in event.data["requests"] if status["status"] == "completed")
        elif event.name.startswith("request."):
            self._follow(event.name, event.data)
        if event.time is not None and self._findings.is_measuring:
            delay = now - event.time
            if self.is_slow:
                self._findings.slow_delays.append(delay)
            else:
                self._findings.delays[event.name].append(delay)

    def _follow(self, name: str, data: dict[str, Any]) -> None:
        """Check the order of what is said of a request: begun once, going on, ended once."""
        request_id, problems = data["id"], self._findings.problems
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


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[str, int, psutil.Process]]:
    """`sgld serve`: host, port and process."""
    flags = ["--device", "cpu", "--num-cpu-threads", "1", "--port", "0", "--data-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with (folder / "log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "sgld_cli", "serve", *flags),
            stdout=log,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
        )
        assert process.stderr is not None
        try:
            line = (await process.stderr.readline()).decode()
            found = re.search(r"http://([^:]+):(\d+)", line)
            assert found, line
            yield found[1], int(found[2]), psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            await process.communicate()


def _same(subscriber: Subscriber) -> Subscriber:
    return subscriber


async def subscribe(host: str, port: int, findings: Findings, count: int) -> list[Subscriber]:
    """Connect all subscribers; the slow ones have small buffers, so that the server feels it."""
    subscribers = []
    for index in range(count):
        is_slow = index < count * PART_OF_SLOW
        connection = socket.socket()
        if is_slow:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, (host, port))
        subscriber = Subscriber(findings, is_slow)
        await loop.create_connection(partial(_same, subscriber), sock=connection)
        subscribers.append(subscriber)
    return subscribers


async def generate(http: httpx2.AsyncClient, made: list[str], until: float) -> None:
    """One picture after the other."""
    while time.monotonic() < until:
        answer = await http.post("/v1/images/generations", json={**BODY, "seed": len(made)})
        answer.raise_for_status()
        made.append(answer.json()["id"])


async def read_slowly(subscribers: list[Subscriber], until: float) -> None:
    """Let the slow ones read nothing, then what is there, and again."""
    slow = [subscriber for subscriber in subscribers if subscriber.is_slow]
    while (left := until - time.monotonic()) > 0:
        for subscriber in slow:
            subscriber.transport.pause_reading()
        await asyncio.sleep(min(SLOW_S, left))
        for subscriber in slow:
            subscriber.transport.resume_reading()
        await asyncio.sleep(min(1.0, max(0.0, until - time.monotonic())))


async def watch(server: psutil.Process, sizes: list[float], loads: list[float], until: float) -> None:
    """Measure the server, and how busy the machine is with all."""
    while time.monotonic() < until:
        sizes.append(server.memory_info().rss / 2**20)
        loads.append(os.getloadavg()[0])
        await asyncio.sleep(1.0)


async def wait_for_ends(subscribers: list[Subscriber], made: set[str]) -> list[int]:
    """How many ends each subscriber misses, once all have them or their time is up."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        missing = [len(made - subscriber.ended) for subscriber in subscribers]
        if not any(missing) or time.monotonic() > deadline:
            return missing
        await asyncio.sleep(0.2)


def growth_mib(sizes: list[float]) -> float:
    """How much larger the last quarter is than the second one."""
    quarter = max(1, len(sizes) // 4)
    return statistics.median(sizes[-quarter:]) - statistics.median(sizes[quarter : 2 * quarter] or sizes)


def spread(delays: list[float]) -> dict[str, float]:
    """Milliseconds."""
    if not delays:
        return {}
    ordered = sorted(delays)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {
        name: round(1000 * ordered[min(len(ordered) - 1, int(part * len(ordered)))], 1) for name, part in at.items()
    }


async def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The load itself; :return: what is to be said of it."""
    findings, made, sizes, loads = Findings(), list[str](), list[float](), list[float]()
    before = os.getloadavg()[0]
    async with serving(folder) as (host, port, server):
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=f"http://{host}:{port}", timeout=TIMEOUT_S, limits=limits) as http:
            # It waits for the model.
            (await http.post("/v1/images/generations", json=BODY)).raise_for_status()
            subscribers = await subscribe(host, port, findings, options.num_subscribers)
            until = time.monotonic() + RAMP_S + options.seconds
            used, started = server.cpu_times(), time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                for _ in range(options.num_generations):
                    tasks.create_task(generate(http, made, until))
                tasks.create_task(read_slowly(subscribers, until))
                tasks.create_task(watch(server, sizes, loads, until))
                await asyncio.sleep(RAMP_S)
                findings.is_measuring = True
            elapsed_s = time.monotonic() - started
            findings.is_measuring = False
            missing = await wait_for_ends(subscribers, set(made))
            now = server.cpu_times()
        for subscriber in subscribers:
            subscriber.leave()
    delays = [delay for some in findings.delays.values() for delay in some]
    return {
        "pictures": len(made),
        "pictures per second": round(len(made) / elapsed_s, 1),
        "events heard": findings.num_events,
        "events heard per second": round(findings.num_events / elapsed_s),
        "delay in ms": spread(delays),
        "delay in ms by event": {name: spread(some) for name, some in findings.delays.items()},
        "delay in ms of slow readers": spread(findings.slow_delays),
        "ends missed": sum(missing),
        "server MiB at the beginning and the end": [round(sizes[0]), round(sizes[-1])],
        "server grew by MiB": round(growth_mib(sizes), 1),
        "server's cores": round((now.user + now.system - used.user - used.system) / elapsed_s, 2),
        "load of the machine before and on average": [round(before, 1), round(statistics.mean(loads), 1)],
        "found": {name: count for name, count in findings.problems.items() if count},
    }


def problems(report: dict[str, Any], max_p99_ms: float) -> list[str]:
    """What isn't as it should be."""
    found = [f"{name}: {count}" for name, count in report["found"].items()]
    if report["ends missed"]:
        found.append(f"{report['ends missed']} ends were missed")
    if not report["delay in ms"] or report["delay in ms"]["p99"] > max_p99_ms:
        found.append(f"p99 of the delay is above {max_p99_ms} ms: {report['delay in ms']}")
    if report["server grew by MiB"] > max(16.0, 0.1 * report["server MiB at the beginning and the end"][0]):
        found.append(f"the server grew by {report['server grew by MiB']} MiB")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--num-subscribers", type=int, default=500)
    parser.add_argument("--num-generations", type=int, default=64)
    parser.add_argument("--max-p99-ms", type=float, default=100.0)
    parser.add_argument("--note", default="", help="what else is to be known, as what else the machine does")
    parser.add_argument("--no-write", action="store_true", help="write no results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(run(options, Path(folder)))
    report = {
        "command": " ".join(["python", "bench/load.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "note": options.note,
        **found,
        "problems": problems(found, options.max_p99_ms),
    }
    text = "# Load\n\n" + "\n".join(f"- {name}: {value}" for name, value in report.items()) + "\n"
    print(text)
    if not options.no_write:
        (RESULTS / "load.json").write_text(json.dumps(report, indent=2) + "\n")
        (RESULTS / "load.md").write_text(text)
    sys.exit(1 if report["problems"] else 0)


if __name__ == "__main__":
    main()
