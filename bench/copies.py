"""Requests that come at the same time, to one copy of a model and to one on each GPU; a part of bench/parallel.py.

Both engines are there at the same time, and one is asked after the other: the one that isn't asked does nothing. A
request is a picture with SDXL at its real size; each copy has as many, and the time of one is that of all, shared.
"""

import math
import os
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too

import anyio
import numpy as np
from crews import Row, Teller
from msgspec.structs import replace
from numpy.typing import NDArray
from real_models import prompt

from sgld import Engine, EngineConfig, SamplingParams
from sgld.events import Completed, Failed
from sgld.execution_config import MemoryConfig
from sgld.ipc.seats import Seat
from sgld.parallel import ParallelConfig

# Of each copy.
NUM_REQUESTS, NUM_STEPS = 48, 20
# Rounds go on until they don't get faster by this: each copy captures its graphs and learns what forwards take.
MIN_GAIN, MAX_ROUNDS = 0.03, 6
READY_S = 120.0
Pictures = list[NDArray[np.uint8]]


def measure(_seat: Seat, teller: Teller, part: Any, device: str, is_tiny: bool) -> None:
    """Entry of the process that has both engines."""
    teller.gate("imported")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        made = (sys.executable, str(Path(__file__).with_name("real_models.py")), folder, "sdxl", "--device", device)
        subprocess.run([*made, *(["--tiny"] if is_tiny else [])], check=True, stdout=subprocess.DEVNULL)
        anyio.run(compared, teller, Path(folder, "sdxl"), part.copies, device, is_tiny)


async def compared(teller: Teller, folder: Path, copies: int, device: str, is_tiny: bool) -> None:
    """One copy, then all."""
    # Nothing is compiled: an engine does that when it has computed for a minute, in the middle of one of the two.
    config = EngineConfig(model_path=str(folder), device=device, memory=MemoryConfig(performance_mode="manual"))  # type: ignore[arg-type]
    counts = 1, copies
    configs = [replace(config, parallel=ParallelConfig(dp_size=gpus)) for gpus in counts]
    sizes = {"height": 64, "width": 64} if is_tiny else {"height": 512, "width": 512}
    num, num_steps = (4, 2) if is_tiny else (NUM_REQUESTS, NUM_STEPS)
    alone: Pictures = []
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(Engine(config)) for config in configs]
        with anyio.fail_after(READY_S):
            for gpus, engine in zip(counts, engines, strict=True):
                await engine.ready()
                print(f"dp {gpus} is ready", file=sys.stderr, flush=True)
        for gpus, engine in zip(counts, engines, strict=True):
            taken_s, pictures = await settled(engine, num, gpus, num_steps, sizes)
            alone = alone or pictures
            row = {"model": "sdxl", "size": tuple(sizes.values()), "rows": 1, "by": "sgld", "gpus": gpus}
            work = f"SDXL {sizes['width']}², {num} requests a copy, each"
            row |= {"work": work, "layout": f"dp {gpus}", "how": "engine", "ms": 1e3 * taken_s / (num * gpus)}
            teller.row(row | {"error": difference(pictures[:num], alone), "is_aside": False})


async def settled(engine: Engine, num: int, copies: int, num_steps: int, sizes: Row) -> tuple[float, Pictures]:
    """Seconds of the fastest round, and the pictures, which are those of each round."""
    best_s = math.inf
    for index in range(MAX_ROUNDS):
        before_s = best_s
        taken_s, pictures = await round_of(engine, num, copies, num_steps, sizes)
        print(f"dp {copies}, round {index}: {taken_s:.1f} s", file=sys.stderr, flush=True)
        best_s = min(taken_s, best_s)
        if best_s > (1 - MIN_GAIN) * before_s:
            break
    return best_s, pictures


async def round_of(engine: Engine, num: int, copies: int, num_steps: int, sizes: Row) -> tuple[float, Pictures]:
    """Seconds from the first request to the last answer, and the pictures."""
    pictures: dict[int, NDArray[np.uint8]] = {}
    every = range(num * copies)

    async def client(index: int) -> None:
        params = SamplingParams(prompt=prompt(index), seed=index, num_inference_steps=num_steps, **sizes)
        async for event in engine.generate(params):
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            if isinstance(event, Completed):
                pictures[index] = event.frames

    start = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for index in every:
            tasks.start_soon(client, index)
    return time.perf_counter() - start, [pictures[index] for index in every]


def difference(pictures: Pictures, others: Pictures) -> float:
    """The largest mean difference of two pictures, in parts of the range of a channel."""
    pairs = zip(pictures, others, strict=True)
    return max(float(np.abs(one.astype(float) - other).mean()) / 255 for one, other in pairs)
