"""Do many different requests at once each end once, with the picture that they give alone, and does nothing pile up?

python bench/soak.py [--num-requests 2000] [--seed 0] [--no-write]

Random sizes, steps, guidance, priorities and exact ones; some are bad, some are left early, and twice the rank is
killed. Writes bench/results/soak.md and soak.json, and ends with code 1 if something isn't as it should be.
"""

import argparse
import json
import os
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import diffusers
import numpy as np
import psutil  # type: ignore[import-untyped]
import reports
import torch
from numpy.typing import NDArray

from sgld import Engine, EngineConfig, SamplingParams
from sgld.events import AnyEvent, Completed, Failed, Terminal
from sgld.models.load import LoadedModel, load
from sgld.worker.arguments import arguments

RESULTS = Path(__file__).parent / "results"
PROMPTS = (
    "a beautiful sunset over the mountains",
    "the sea at night with a moon",
    "a red circle on a blue background",
    "noon over the desert",
    "three small green triangles",
    "dawn over green hills with a house",
)
SIZES = ((64, 64), (64, 96), (128, 128))
MAX_AT_ONCE = 24
# The rank is killed when these parts of the requests have ended.
KILLED_AT = (0.35, 0.7)
# Rounding may move a channel of a pixel by a level where a forward was shared.
MAX_LEVELS = 1


@dataclass(frozen=True)
class Wish:
    """One request, whether it can be served, and after how many events its client leaves, if it does."""

    params: SamplingParams
    is_bad: bool
    leaves_after: int | None


@dataclass
class Log:
    """What came of the requests."""

    ends: Counter[str] = field(default_factory=Counter)
    num_restarts: int = 0
    pictures: list[tuple[SamplingParams, NDArray[np.uint8]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    kill_at: int | None = None
    """The rank is killed when so many requests have ended."""
    rank_sizes: list[tuple[int, float, int]] = field(default_factory=list)
    """Requests ended, resident MiB and threads of the rank, where no request ran."""


def wishes(count: int, seed: int) -> Iterator[Wish]:
    """The same requests for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        height, width = rng.choice(SIZES)
        is_bad = rng.random() < 0.05
        extra = {"use_resolution_binning": False} | ({"colour": "red"} if is_bad else {})
        params = SamplingParams(
            prompt=rng.choice(PROMPTS),
            height=height,
            width=width,
            num_inference_steps=rng.randint(1, 5),
            guidance_scale=rng.choice((1.0, 2.5, 4.0)),
            seed=rng.randrange(1000),
            priority=rng.choice((0, 0, 0, 1, -1)),
            exact=rng.random() < 0.15,
            diffusers_kwargs=extra,
        )
        yield Wish(params, is_bad, rng.randint(1, 5) if rng.random() < 0.12 else None)


async def soak(engine: Engine, all_wishes: list[Wish], log: Log) -> None:
    """Send all requests, MAX_AT_ONCE at a time; between the rounds nothing runs, and the rank is measured."""
    num_rounds = max(4, len(all_wishes) // 100)
    kills = [int(part * num_rounds) for part in KILLED_AT]
    for index in range(num_rounds):
        part = all_wishes[index * len(all_wishes) // num_rounds : (index + 1) * len(all_wishes) // num_rounds]
        waiting = iter(part)
        if index in kills:
            log.kill_at = log.ends.total() + len(part) // 2
        async with anyio.create_task_group() as tasks:
            for _ in range(MAX_AT_ONCE):
                tasks.start_soon(_client, engine, waiting, log)
        rank = _rank()
        log.rank_sizes.append((log.ends.total(), rank.memory_info().rss / 2**20, rank.num_threads()))


async def _client(engine: Engine, waiting: Iterator[Wish], log: Log) -> None:
    for wish in waiting:
        events: list[AnyEvent] = []
        stream = engine.generate(wish.params)
        async for event in stream:
            events.append(event)
            if wish.leaves_after is not None and len(events) == wish.leaves_after and not isinstance(event, Terminal):
                break
        await stream.aclose()
        _judge(wish, events, log)
        if log.kill_at is not None and log.ends.total() >= log.kill_at:
            log.kill_at = None
            _rank().kill()


def _judge(wish: Wish, events: list[AnyEvent], log: Log) -> None:
    ends = [event for event in events if isinstance(event, Terminal)]
    log.num_restarts += sum(type(event).__name__ == "Restarted" for event in events)
    log.ends[type(ends[0]).__name__ if ends else "left"] += 1
    if len(ends) > 1 or (not ends and wish.leaves_after is None):
        log.problems.append(f"{wish.params} ended {len(ends)} times")
    match ends:
        case [Completed(frames=frames)]:
            if wish.is_bad:
                log.problems.append(f"{wish.params} was served")
            log.pictures.append((wish.params, frames))
        case [Failed(message=message)] if not wish.is_bad:
            log.problems.append(f"{wish.params} failed: {message}")


def _rank() -> psutil.Process:
    (rank,) = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    return rank


def check_pictures(model: LoadedModel, log: Log) -> dict[str, Any]:
    """Compare each picture with the one of a plain pipeline."""
    num_different, most = 0, 0
    for params, frames in log.pictures:
        kwargs = arguments(model.pipeline, params, model.defaults, []) | {"output_type": "np"}
        plain = (model.pipeline(**kwargs).images * 255).round().clip(0, 255)
        levels = int(np.abs(frames.astype(int) - plain.astype(int)).max())
        num_different += levels > 0
        most = max(most, levels)
        if levels > (0 if params.exact else MAX_LEVELS):
            log.problems.append(f"{params} differs by {levels} levels")
    return {"pictures": len(log.pictures), "differ in rounding": num_different, "levels at most": most}


def check_growth(log: Log) -> None:
    """The rank may not grow after it has seen everything: its threads are gone, its memory stays."""
    by_life: list[list[tuple[int, float, int]]] = [[]]
    for before, now in zip([log.rank_sizes[0], *log.rank_sizes], log.rank_sizes, strict=False):
        # A new process is smaller and has to see everything again.
        if now[1] < 0.8 * before[1]:
            by_life.append([])
        by_life[-1].append(now)
    for life in by_life:
        if len(life) >= 6:
            early, late = life[len(life) // 2], life[-1]
            if late[1] > 1.1 * early[1] + 32 or late[2] > early[2]:
                log.problems.append(f"the rank grew from {early} to {late} (ended, MiB, threads)")


async def run(config: EngineConfig, count: int, seed: int) -> tuple[Log, float]:
    """The soak itself, and its seconds."""
    log = Log()
    async with Engine(config) as engine:
        await engine.ready()
        start = time.perf_counter()
        await soak(engine, list(wishes(count, seed)), log)
        elapsed_s = time.perf_counter() - start
    return log, elapsed_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-write", action="store_true", help="write no results")
    options = parser.parse_args()
    # One thread, so that bits don't depend on how work is shared out.
    config = EngineConfig(device="cpu", num_cpu_threads=1, run_timeout_s=30.0)
    log, elapsed_s = anyio.run(run, config, options.num_requests, options.seed)
    torch.set_num_threads(1)
    model = load(config)
    model.pipeline.set_progress_bar_config(disable=True)
    compared = check_pictures(model, log)
    check_growth(log)
    if log.ends.total() != options.num_requests:
        log.problems.append(f"{log.ends.total()} of {options.num_requests} requests ended")
    report = {
        "command": reports.command(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}",
        "seconds": round(elapsed_s, 1),
        "ends": dict(log.ends),
        "restarts seen by requests": log.num_restarts,
        "pictures": compared,
        "rank (requests ended, MiB, threads)": [(n, round(mib), threads) for n, mib, threads in log.rank_sizes],
        "problems": log.problems,
    }
    text = "# Soak\n\n" + "\n".join(f"- {name}: {value}" for name, value in report.items()) + "\n"
    print(text)
    if not options.no_write:
        (RESULTS / "soak.json").write_text(json.dumps(report, indent=2) + "\n")
        (RESULTS / "soak.md").write_text(text)
    sys.exit(1 if log.problems else 0)


if __name__ == "__main__":
    main()
