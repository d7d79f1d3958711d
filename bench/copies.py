"""Clients that always want another picture, of one copy of a model and of one on each GPU; a part of bench/parallel.py.

Both engines are there at the same time, and one is asked after the other: the one that isn't asked does nothing. A
picture is one with SDXL at its real size. Each copy has as many clients, and they get pictures as fast as steps are
done, which are counted for some seconds at a time.
"""

import itertools
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

# Of each copy. There are always enough for the largest batch, so that copies don't find different ones best.
NUM_CLIENTS, MAX_BATCH, NUM_STEPS = 12, 4, 20
WINDOW_S = 5.0
# That goes on until it doesn't get faster by this: each copy captures its graphs and learns what forwards take.
MIN_GAIN, PATIENCE, MAX_WINDOWS = 0.01, 2, 12
READY_S = 120.0
Pictures = dict[int, NDArray[np.uint8]]
"""The first one of each client."""


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
    memory = MemoryConfig(performance_mode="manual")
    config = EngineConfig(model_path=str(folder), device=device, memory=memory, max_batch_size=MAX_BATCH)  # type: ignore[arg-type]
    counts = 1, copies
    configs = [replace(config, parallel=ParallelConfig(dp_size=gpus)) for gpus in counts]
    sizes = {"height": 64, "width": 64} if is_tiny else {"height": 512, "width": 512}
    alone: Pictures = {}
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(Engine(config)) for config in configs]
        with anyio.fail_after(READY_S):
            for gpus, engine in zip(counts, engines, strict=True):
                # The engine is ready when the first one is.
                while not all(replica.is_ready for replica in engine.statistics().replicas):  # noqa: ASYNC110
                    await anyio.sleep(0.1)
                print(f"dp {gpus} is ready", file=sys.stderr, flush=True)
        for gpus, engine in zip(counts, engines, strict=True):
            pictures: Pictures = {}
            async with anyio.create_task_group() as tasks:
                for index in range(NUM_CLIENTS * gpus):
                    tasks.start_soon(client, engine, index, sizes, pictures)
                rate = await settled(engine, gpus, WINDOW_S / 10 if is_tiny else WINDOW_S, pictures)
                tasks.cancel_scope.cancel()
            alone = alone or pictures
            row = {"model": "sdxl", "size": tuple(sizes.values()), "rows": 1, "by": "sgld", "gpus": gpus}
            work = f"SDXL {sizes['width']}², {NUM_CLIENTS} clients a copy, each picture"
            row |= {"work": work, "layout": f"dp {gpus}", "how": "engine", "ms": 1e3 / rate}
            teller.row(row | {"error": difference(pictures, alone), "is_aside": False})


async def client(engine: Engine, index: int, sizes: Row, pictures: Pictures) -> None:
    """Wants one picture after the other, and keeps the first one."""
    for seed in itertools.count(index, 1000):
        params = SamplingParams(prompt=prompt(index), seed=seed, num_inference_steps=NUM_STEPS, **sizes)
        async for event in engine.generate(params):
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            if isinstance(event, Completed):
                pictures.setdefault(index, event.frames)


async def settled(engine: Engine, copies: int, window_s: float, pictures: Pictures) -> float:
    """Pictures a second, in the fastest window, when each client has had one.

    :raises RuntimeError: one still has none.
    """
    best, num_slow = 0.0, 0
    for index in range(MAX_WINDOWS):
        start, before = time.perf_counter(), num_denoised(engine)
        await anyio.sleep(window_s)
        rate = (num_denoised(engine) - before) / NUM_STEPS / (time.perf_counter() - start)
        print(f"dp {copies}, window {index}: {rate:.3f} pictures a second", file=sys.stderr, flush=True)
        num_slow = num_slow + 1 if 0 < rate < (1 + MIN_GAIN) * best else 0
        best = max(best, rate)
        if num_slow >= PATIENCE and len(pictures) == NUM_CLIENTS * copies:
            break
    if (missing := NUM_CLIENTS * copies - len(pictures)) > 0:
        raise RuntimeError(f"{missing} clients had no picture in {MAX_WINDOWS} windows")
    return best


def num_denoised(engine: Engine) -> int:
    """Steps of pictures so far."""
    return sum(calls.num_calls for calls in engine.statistics().calls if calls.kind == "denoise")


def difference(pictures: Pictures, others: Pictures) -> float:
    """The largest mean difference of pictures of the same clients, in parts of the range of a channel."""
    pairs = [(pictures[index], others[index]) for index in pictures.keys() & others.keys()]
    return max(float(np.abs(one.astype(float) - other).mean()) / 255 for one, other in pairs)
