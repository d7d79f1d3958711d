"""What do step caches cost in quality, and what do they save?

python bench/step_cache.py [--prompts 4] [--out bench/results/step_cache]
python bench/step_cache.py --device cuda [--sizes 17x256x256 17x480x832] [--out bench/results/step_cache_gpu]

On a CPU: the two models that ship, each picture against the one without a cache (PSNR, SSIM), and against what as many
forwards without a cache make of it. Time is CPU time of the denoiser, on one thread. On a GPU: a Wan pipeline whose
transformer has the width of Wan 2.1 1.3B, half of its layers and random weights, so its pictures say nothing: only
times count, and first blocks skip as often as they may.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too
os.environ.setdefault("TQDM_DISABLE", "1")

import anyio
import msgspec
import reports
import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from torch import nn

import sgld.models.embedded.evaluation as evaluation
from sgld.config import EngineConfig
from sgld.engine.engine import Engine
from sgld.events import Failed, Progress
from sgld.models.embedded.networks import DEFAULTS_FILE
from sgld.models.resolve import EMBEDDED
from sgld.sampling_params import FirstBlockCache, SamplingParams, StepCacheParams, TaylorCache
from sgld.testing import run_together

MAX_PSNR_DB = 100.0
PROMPT = "sunset over the sea, the sun is setting"
CACHES: tuple[StepCacheParams, ...] = (
    *(TaylorCache(interval=interval, order=order) for interval in (2, 3, 4) for order in (0, 1)),
    TaylorCache(interval=3, order=2),
    *(FirstBlockCache(threshold=threshold) for threshold in (0.05, 0.1, 0.2, 0.4)),
)
ON_A_GPU: tuple[StepCacheParams, ...] = (
    *(TaylorCache(interval=interval, order=1) for interval in (2, 3, 4)),
    *(FirstBlockCache(threshold=10, max_skips=num) for num in (1, 2, 3)),
)


def name_of(cache: StepCacheParams | None) -> str:
    """A cache in a few words."""
    match cache:
        case TaylorCache(interval=interval, order=order):
            return f"taylor, interval {interval}, order {order}"
        case FirstBlockCache(threshold=threshold, max_skips=max_skips):
            return f"first_block, threshold {threshold:g}, max_skips {max_skips}"
    return "none"


def psnr_db(made: torch.Tensor, expected: torch.Tensor) -> float:
    """Of pictures in [0, 1]."""
    return min(MAX_PSNR_DB, float(-10 * torch.log10((made - expected).square().mean())))


def ssim(made: torch.Tensor, expected: torch.Tensor) -> float:
    """Structural similarity of pictures (N, C, H, W) in [0, 1].

    Source: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity (2004), equation 13,
    with its window: 11 pixels, Gaussian, sigma 1.5.
    """
    line = torch.exp(-(torch.arange(11.0) - 5).square() / (2 * 1.5**2))
    window = torch.outer(line / line.sum(), line / line.sum())[None, None]

    def mean(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x.flatten(0, 1)[:, None], window)

    mean_a, mean_b = mean(made), mean(expected)
    var_a, var_b = mean(made * made) - mean_a**2, mean(expected * expected) - mean_b**2
    covariance = mean(made * expected) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    top, bottom = (
        (2 * mean_a * mean_b + c1) * (2 * covariance + c2),
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2),
    )
    return float((top / bottom).mean())


@contextmanager
def cpu_time_of(module: nn.Module) -> Iterator[list[float]]:
    """Seconds of CPU time of each forward inside the block."""
    times: list[float] = []
    handles = [
        module.register_forward_pre_hook(lambda *_: times.append(-time.process_time())),
        module.register_forward_hook(lambda *_: times.append(times.pop() + time.process_time())),
    ]
    try:
        yield times
    finally:
        for handle in handles:
            handle.remove()


def pixels(output: Any) -> torch.Tensor:
    """(N, 3, H, W) in [0, 1]."""
    made = output.images if hasattr(output, "images") else output.frames[0]
    return torch.as_tensor(made).float()


class Model:
    """One of the models that ship, and the pictures that it makes of some prompts."""

    def __init__(self, name: str, num_prompts: int) -> None:
        folder = Path(evaluation.__file__).parent / name
        self.name = name
        self._pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        self._pipeline.set_progress_bar_config(disable=True)
        self._options = json.loads((folder / DEFAULTS_FILE).read_text())
        self._options.pop("fps", None)
        self.num_steps = int(self._options["num_inference_steps"])
        moving = "num_frames" in self._options
        _, self._prompts = evaluation.held_out_prompts(num_prompts, seed=7, moving=moving)

    def made(self, num_steps: int, cache: StepCacheParams | None) -> tuple[list[torch.Tensor], float, float]:
        """Pictures of all prompts, forwards that weren't skipped and CPU seconds, these two for one picture."""
        made, num_computed, seconds = [], 0, 0.0
        for seed, prompt in enumerate(self._prompts):
            options = self._options | {"num_inference_steps": num_steps, "output_type": "pt", "prompt": prompt}
            options["generator"] = torch.Generator().manual_seed(seed)
            with cpu_time_of(self._pipeline.transformer) as times:
                report = run_together(self._pipeline, [options], merge=False, caches=[cache])
            if isinstance(report.outputs[0], BaseException):
                raise report.outputs[0]
            made.append(pixels(report.outputs[0]))
            num_calls = len(times) if not isinstance(cache, FirstBlockCache) else len(times) - 1  # one is a test
            skipped = report.skipped_calls[0] if isinstance(cache, FirstBlockCache) else 0
            num_computed += num_calls - skipped
            seconds += sum(times)
        return made, num_computed / len(made), seconds / len(made)

    def rows(self, num_steps: int) -> Iterator[dict[str, Any]]:
        """One for each cache."""
        expected, num_calls, seconds = self.made(num_steps, None)
        fewer: dict[int, list[torch.Tensor]] = {}
        for cache in CACHES:
            made, num_computed, cached_seconds = self.made(num_steps, cache)
            equal = max(1, round(num_steps * num_computed / num_calls))
            if equal not in fewer:
                fewer[equal] = self.made(equal, None)[0]
            yield {
                "model": self.name,
                "steps": num_steps,
                "cache": name_of(cache),
                "computed": num_computed / num_calls,
                "time": cached_seconds / seconds,
                "psnr_db": statistics.mean(map(psnr_db, made, expected)),
                "ssim": statistics.mean(map(ssim, made, expected)),
                "fewer_steps": equal,
                "fewer_steps_psnr_db": statistics.mean(map(psnr_db, fewer[equal], expected)),
            }


def on_cpu(num_prompts: int, steps: list[int]) -> list[dict[str, Any]]:
    """The rows of both models."""
    torch.set_num_threads(1)
    rows = []
    for name in ("tiny_image", "tiny_video"):
        model = Model(name, num_prompts if name == "tiny_image" else (num_prompts + 1) // 2)
        for num_steps in steps or ([model.num_steps, 28] if name == "tiny_image" else [model.num_steps]):
            for row in model.rows(num_steps):
                print(row, flush=True)
                rows.append(row)
    return rows


def cpu_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Means over the prompts. PSNR and SSIM are against the picture of that seed without a cache; the last column",
        "is the PSNR of one without a cache and with as many steps as were computed. Times are CPU time of the",
        "denoiser, beside other work of the machine; those of first_block have the test of its first computed step.",
    ]
    for model in dict.fromkeys((row["model"], row["steps"]) for row in rows):
        lines += ["", f"## sgld/{model[0].replace('_', '-')}, {model[1]} steps", ""]
        head = ["cache", "computed", "CPU time", "PSNR, dB", "SSIM", "fewer steps instead"]
        lines += reports.table(head, [_cpu_cells(row) for row in rows if (row["model"], row["steps"]) == model])
    return lines


def _cpu_cells(row: dict[str, Any]) -> list[str]:
    instead = f"{_shown(row['fewer_steps_psnr_db'])} ({row['fewer_steps']} steps)"
    shares = [f"{row['computed']:.0%}", f"{row['time']:.0%}"]
    return [row["cache"], *shares, _shown(row["psnr_db"]), f"{row['ssim']:.3f}", instead]


def _shown(psnr_db: float) -> str:
    return f"{psnr_db:.1f}" if psnr_db < MAX_PSNR_DB else "identical"


def save(folder: Path, layers: int, heads: int) -> None:
    """A pipeline of that size, with the text encoder and the VAE of the small one that ships."""
    pipeline = DiffusionPipeline.from_pretrained(EMBEDDED["sgld/tiny-video"], dtype=torch.bfloat16)
    small = pipeline.transformer.config
    pipeline.transformer = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=128,
        in_channels=small.in_channels,
        out_channels=small.out_channels,
        text_dim=small.text_dim,
        ffn_dim=heads * 128 * 35 // 6,
        num_layers=layers,
    ).to(torch.bfloat16)
    pipeline.save_pretrained(folder)


async def denoised(engine: Engine, params: SamplingParams) -> list[float]:
    """When each step ended."""
    ends = []
    async for event in engine.generate(params):
        if isinstance(event, Failed):
            raise RuntimeError(event.message)
        if isinstance(event, Progress):
            ends.append(time.perf_counter())
    return ends


async def together_s(engine: Engine, requests: list[SamplingParams]) -> float:
    """Seconds of several requests at once, from the first step that is done to the last."""
    ends: list[float] = []

    async def run(params: SamplingParams) -> None:
        ends.extend(await denoised(engine, params))

    async with anyio.create_task_group() as group:
        for params in requests:
            group.start_soon(run, params)
    return max(ends) - min(ends)


async def on_gpu(folder: Path, sizes: list[str], steps: int, device: str) -> list[dict[str, Any]]:
    """The rows of one request alone, and of four that run at once."""
    rows = []
    async with Engine(EngineConfig(model_path=str(folder), device=device)) as engine:  # type: ignore[arg-type]
        await engine.ready()
        for size in sizes:
            frames, height, width = map(int, size.split("x"))
            plain = SamplingParams(
                prompt=PROMPT, num_frames=frames, height=height, width=width, num_inference_steps=steps
            )
            requests = {cache: msgspec.structs.replace(plain, cache=cache) for cache in (None, *ON_A_GPU)}
            for params in requests.values():  # what is learned and proved once
                await together_s(engine, [msgspec.structs.replace(params, num_inference_steps=6)] * 4)
            alone: dict[StepCacheParams | None, float] = {}
            for cache, params in requests.items():
                ends = await denoised(engine, params)
                alone[cache] = ends[-1] - ends[0]
                rows.append(
                    {
                        "size": size,
                        "cache": name_of(cache),
                        "alone_s": alone[cache],
                        "longest_step_ms": 1e3 * max(after - before for before, after in pairwise(ends)),
                        "four_s": await together_s(engine, [params] * 4),
                    }
                )
                print(rows[-1], flush=True)
            mixed = [requests[cache] for cache in (None, ON_A_GPU[1], ON_A_GPU[4], ON_A_GPU[5])]
            names = " / ".join(name_of(params.cache) for params in mixed)
            rows.append({"size": size, "cache": f"four at once: {names}", "four_s": await together_s(engine, mixed)})
            print(rows[-1], flush=True)
    return rows


def gpu_table(rows: list[dict[str, Any]], steps: int) -> list[str]:
    lines = [
        f"{steps} steps, two forwards each; seconds from the end of the first step to that of the last, and as part of",
        "those without a cache. Four: as many requests at the same time.",
    ]
    for size in dict.fromkeys(row["size"] for row in rows):
        of_size = [row for row in rows if row["size"] == size]
        plain = of_size[0]
        cells = []
        for row in of_size:
            times = [(row[key], row[key] / plain[key]) if key in row else None for key in ("alone_s", "four_s")]
            cells.append([row["cache"], *(text for time in times for text in _shown_time(time))])
        lines += ["", f"## {size}", "", *reports.table(["cache", "alone, s", "", "four, s", ""], cells)]
    return lines


def _shown_time(time: tuple[float, float] | None) -> tuple[str, str]:
    """Seconds, and their part of those without a cache."""
    return ("", "") if time is None else (f"{time[0]:.2f}", f"{time[1]:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--random", action="store_true", help="what is done on a GPU, on a CPU: to try the script")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument(
        "--steps", type=int, nargs="*", default=[], help="CPU: the models' own, and 28 for pictures; GPU: 20"
    )
    parser.add_argument("--layers", type=int, default=15, help="fewer, to try the script")
    parser.add_argument("--heads", type=int, default=12, help="fewer, to try the script")
    parser.add_argument("--sizes", nargs="*", default=["17x256x256", "17x480x832"], help="FRAMESxHEIGHTxWIDTH")
    parser.add_argument("--out", type=Path, help="writes FILE.json and FILE.md")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.device == "cuda" or args.random:
        steps = args.steps[0] if args.steps else 20
        with tempfile.TemporaryDirectory() as temporary:
            save(Path(temporary), args.layers, args.heads)
            rows = anyio.run(on_gpu, Path(temporary), args.sizes, steps, args.device)
        table = gpu_table(rows, steps)
    else:
        rows = on_cpu(args.prompts, args.steps)
        table = cpu_table(rows)
    report = {
        "command": reports.command(),
        **reports.where(args.device),
        "rows": rows,
    }
    lines = ["# What step caches cost and save", "", f"`{report['command']}`", ""]
    lines += [f"{report['machine']}; torch {version('torch')}, diffusers {version('diffusers')}.", "", *table]
    if args.out:
        reports.write(args.out, report, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
