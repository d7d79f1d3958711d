"""What does a lone request gain whose pipeline calls the denoiser twice in a step, when both share a forward?

python bench/guided.py [--device cuda] [--steps 24] [--sizes 17x256x256 33x480x832] [--out bench/results/guided_gpu]

A Wan pipeline with a transformer of the size of Wan 2.1 1.3B and random weights. The plain pipeline runs its two
forwards one after the other; the engine finds out by itself what pays. Of each request the median step counts.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too
os.environ.setdefault("TQDM_DISABLE", "1")

import anyio
import reports
import torch
from diffusers import DiffusionPipeline
from step_cache import denoised, save

from sgld.config import EngineConfig, GraphConfig
from sgld.engine.engine import Engine
from sgld.sampling_params import SamplingParams

PROMPT = "sunset over the sea, the sun is setting"
NUM_REQUESTS = 4
NUM_HEADS = 12

_ENGINES = {"engine": GraphConfig(), "without_graphs": GraphConfig(graph_memory=0)}


def plain_step_ms(folder: Path, size: tuple[int, int, int], steps: int, device: str) -> float:
    """The median step of the plain pipeline, with latents as its result."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    pipeline.set_progress_bar_config(disable=True)
    ends: list[float] = []

    def note(_pipeline: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        if device == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return {}

    frames, height, width = size
    for _ in range(2):
        ends.clear()
        pipeline(
            PROMPT,
            num_frames=frames,
            height=height,
            width=width,
            num_inference_steps=steps,
            output_type="latent",
            callback_on_step_end=note,
        )
    return 1e3 * statistics.median(after - before for before, after in pairwise(ends))


async def engine_step_ms(
    folder: Path, size: tuple[int, int, int], steps: int, device: str, graphs: GraphConfig
) -> list[float]:
    """The median step of each of several requests, one after the other."""
    frames, height, width = size
    params = SamplingParams(prompt=PROMPT, num_frames=frames, height=height, width=width, num_inference_steps=steps)
    medians = []
    config = EngineConfig(model_path=str(folder), device=device, graphs=graphs)  # type: ignore[arg-type]
    async with Engine(config) as engine:
        await engine.ready()
        for _ in range(NUM_REQUESTS):
            ends = await denoised(engine, params)
            medians.append(1e3 * statistics.median(after - before for before, after in pairwise(ends)))
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--layers", type=int, default=30, help="fewer, to try the script")
    parser.add_argument("--sizes", nargs="*", default=["17x256x256", "33x480x832"], help="FRAMESxHEIGHTxWIDTH")
    parser.add_argument("--out", type=Path, help="writes FILE.json and FILE.md")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save(folder, args.layers, NUM_HEADS)
        for name in args.sizes:
            frames, height, width = map(int, name.split("x"))
            size = frames, height, width
            row: dict[str, Any] = {"size": name, "plain": plain_step_ms(folder, size, args.steps, args.device)}
            for column, graphs in _ENGINES.items():
                row[column] = anyio.run(engine_step_ms, folder, size, args.steps, args.device, graphs)
            rows.append(row)
            print(rows[-1], flush=True)
    report = {
        "command": reports.command(),
        **reports.where(args.device),
        "rows": rows,
    }
    lines = ["# Two forwards of a lone request's step as one", "", f"`{report['command']}`", ""]
    lines += [f"{report['machine']}; torch {version('torch')}, diffusers {version('diffusers')}. Median step, ms."]
    head = ["size", "plain pipeline", "engine, request by request", "without CUDA graphs"]
    cells = (
        (row["size"], f"{row['plain']:.1f}", *(", ".join(f"{ms:.1f}" for ms in row[name]) for name in _ENGINES))
        for row in rows
    )
    lines += ["", *reports.table(head, cells)]
    if args.out:
        reports.write(args.out, report, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
