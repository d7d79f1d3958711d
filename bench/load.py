"""Does everybody who watches a busy server hear all of it, in order and at once, while some don't listen?

python bench/load.py [--seconds 600] [--num-subscribers 500] [--num-generations 64] [--max-p99-ms 100]
    [--max-growth-mib 16] [--note TEXT] [--no-write]

`sgld serve` with the small model that ships, in processes of its own, and clients on loopback: a process that watches
/v1/events on many connections (bench/watchers.py), some of which stop reading again and again, and generations that
follow each other. Delays are from the time that the server gives an event (`created_at`, `started_at`, `ended_at`) to
the time when a client has read it. Writes bench/results/load.md and load.json, and ends with code 1 if something isn't
as it should be.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx2
import psutil  # type: ignore[import-untyped]
import reports
import watchers
from watchers import Ask, Findings

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
# 64x64 with few steps: as many events as this machine can make.
BODY = {
    "prompt": "a red circle",
    "size": "64x64",
    "num_inference_steps": 4,
    "diffusers_kwargs": {"use_resolution_binning": False},
}
RAMP_S = 5.0
TIMEOUT_S = 60.0


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


@contextmanager
def watching(address: tuple[str, int], count: int) -> Iterator[Connection]:
    """The process that watches; all its streams are there."""
    mine, its = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=watchers.watch, args=(address, count, its))
    process.start()
    its.close()
    try:
        if not mine.poll(TIMEOUT_S):
            raise TimeoutError("those who watch can't connect")
        mine.recv()
        yield mine
    finally:
        process.kill()
        process.join()


async def generate(http: httpx2.AsyncClient, made: list[str], until: float) -> None:
    """One picture after the other."""
    while time.monotonic() < until:
        answer = await http.post("/v1/images/generations", json={**BODY, "seed": len(made)})
        answer.raise_for_status()
        made.append(answer.json()["id"])


@dataclass
class Sizes:
    """MiB, once a second."""

    server: list[float] = field(default_factory=list)
    ranks: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    """Of the machine."""


async def measure(server: psutil.Process, sizes: Sizes, until: float) -> None:
    """Measure the server, and how busy the machine is with all."""
    while time.monotonic() < until:
        sizes.server.append(server.memory_info().rss / 2**20)
        sizes.ranks.append(sum(child.memory_info().rss for child in server.children()) / 2**20)
        sizes.loads.append(os.getloadavg()[0])
        await asyncio.sleep(1.0)


async def wait_for_ends(pipe: Connection, made: set[str]) -> list[int]:
    """How many ends each of those who watch misses, once all have them or their time is up."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        pipe.send(Ask(made=made))
        missing: list[int] = await asyncio.to_thread(pipe.recv)
        if not any(missing) or time.monotonic() > deadline:
            return missing
        await asyncio.sleep(0.5)


def cpu_s(process: psutil.Process) -> float:
    """What it has used of all cores."""
    times = process.cpu_times()
    return float(times.user + times.system)


async def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The load itself; :return: what is to be said of it."""
    made, sizes = list[str](), Sizes()
    before = os.getloadavg()[0]
    async with serving(folder) as (host, port, server):
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=f"http://{host}:{port}", timeout=None, limits=limits) as http:
            # It waits for the model.
            (await http.post("/v1/images/generations", json=BODY)).raise_for_status()
            with watching((host, port), options.num_subscribers) as pipe:
                until = time.monotonic() + RAMP_S + options.seconds
                used, started = cpu_s(server), time.monotonic()
                async with asyncio.TaskGroup() as tasks:
                    for _ in range(options.num_generations):
                        tasks.create_task(generate(http, made, until))
                    tasks.create_task(measure(server, sizes, until))
                    await asyncio.sleep(RAMP_S)
                    pipe.send(Ask(is_measuring=True))
                pipe.send(Ask())
                elapsed_s, used = time.monotonic() - started, cpu_s(server) - used
                missing = await wait_for_ends(pipe, set(made))
                pipe.send(Ask(is_last=True))
                findings: Findings = await asyncio.to_thread(pipe.recv)
    return {
        "pictures": len(made),
        "pictures per second": round(len(made) / elapsed_s, 1),
        "events heard": findings.num_events,
        "events heard per second": round(findings.num_events / elapsed_s),
        "delay in ms": watchers.spread(sum(findings.delays.values(), Counter())),
        "delay in ms by event": {name: watchers.spread(some) for name, some in findings.delays.items()},
        "delay in ms of slow readers": watchers.spread(findings.slow_delays),
        "ends missed": sum(missing),
        "server MiB at the beginning and the end": [round(sizes.server[0]), round(sizes.server[-1])],
        "server grew by MiB": round(watchers.growth(sizes.server), 1),
        "rank grew by MiB": round(watchers.growth(sizes.ranks), 1),
        "server's cores": round(used / elapsed_s, 2),
        "server's time for each event heard, in µs": round(1e6 * used / max(1, findings.num_events), 1),
        "cores of those who watch": round(findings.cpu_s / elapsed_s, 2),
        "load of the machine before and on average": [round(before, 1), round(statistics.mean(sizes.loads), 1)],
        "found": {name: count for name, count in findings.problems.items() if count},
    }


def problems(report: dict[str, Any], max_p99_ms: float, max_growth_mib: float) -> list[str]:
    """What isn't as it should be."""
    found = [f"{name}: {count}" for name, count in report["found"].items()]
    if report["ends missed"]:
        found.append(f"{report['ends missed']} ends were missed")
    if not report["delay in ms"] or report["delay in ms"]["p99"] > max_p99_ms:
        found.append(f"p99 of the delay is above {max_p99_ms} ms: {report['delay in ms']}")
    max_growth = max(max_growth_mib, 0.1 * report["server MiB at the beginning and the end"][0])
    found += [
        f"{name}: {report[name]}" for name in ("server grew by MiB", "rank grew by MiB") if report[name] > max_growth
    ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--num-subscribers", type=int, default=500)
    parser.add_argument("--num-generations", type=int, default=64)
    parser.add_argument("--max-p99-ms", type=float, default=100.0)
    parser.add_argument("--max-growth-mib", type=float, default=16.0, help="of the server, and of the rank")
    parser.add_argument("--note", default="", help="what else is to be known, as what else the machine does")
    parser.add_argument("--no-write", action="store_true", help="write no results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(run(options, Path(folder)))
    report = {
        "command": reports.command(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "note": options.note,
        **found,
        "problems": problems(found, options.max_p99_ms, options.max_growth_mib),
    }
    text = "# Load\n\n" + "\n".join(f"- {name}: {value}" for name, value in report.items()) + "\n"
    print(text)
    if not options.no_write:
        (RESULTS / "load.json").write_text(json.dumps(report, indent=2) + "\n")
        (RESULTS / "load.md").write_text(text)
    sys.exit(1 if report["problems"] else 0)


if __name__ == "__main__":
    main()
