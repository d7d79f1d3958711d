"""What does compiling denoisers cost and gain: for the server that does it, and for one that has a process do it?

Denoisers of three kinds with real widths, few layers and random weights. For each, in processes of their own: compiled
by its first forwards with an empty cache (cold), again with that cache (warm), and with a cache that the compiler's
process filled from what one forward of one row and one of two rows told it (aside). Then how many graphs rows of 1 to 4
in three sizes took, and how long forwards take.

    python bench/compilation.py --out bench/results/compilation_gpu

`--tiny --device cpu` tries it out. On an H200 it takes three minutes.
"""

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too

import reports
import torch
from torch import nn

from sgld.models.placement import compile_components, regions
from sgld.worker.aside import CompilerProcess, Watch
from sgld.worker.compilation import watched_compilations
from sgld.worker.compiler import graphs_of_cache
from sgld.worker.invocation import Invocation
from sgld.worker.runtime import Runtime
from sgld.worker.swap import Swap

ROWS = (1, 2, 3, 4)
Arguments = Callable[[int, int], dict[str, torch.Tensor]]


def flux(tiny: bool, device: str) -> tuple[nn.Module, Arguments, tuple[int, ...]]:
    from diffusers import FluxTransformer2DModel

    heads, width, text, axes = (2, 16, 32, (4, 4, 8)) if tiny else (24, 128, 4096, (16, 56, 56))
    with torch.device(device):
        model = FluxTransformer2DModel(
            num_layers=2, num_single_layers=2, num_attention_heads=heads, attention_head_dim=width,
            joint_attention_dim=text, pooled_projection_dim=32, axes_dims_rope=axes, guidance_embeds=True,
        )  # fmt: skip

    def arguments(rows: int, size: int) -> dict[str, torch.Tensor]:
        tokens, of_text = (size // 16) ** 2, 512 if not tiny else 8
        return {
            "hidden_states": torch.randn(rows, tokens, 64),
            "encoder_hidden_states": torch.randn(rows, of_text, text),
            "pooled_projections": torch.randn(rows, 32),
            "timestep": torch.rand(rows),
            "guidance": torch.ones(rows),
            "img_ids": torch.zeros(tokens, 3),
            "txt_ids": torch.zeros(of_text, 3),
        }

    return model, arguments, (256, 512, 1024) if not tiny else (64, 96, 128)


def wan(tiny: bool, device: str) -> tuple[nn.Module, Arguments, tuple[int, ...]]:
    from diffusers import WanTransformer3DModel

    heads, width, text, ffn = (2, 16, 32, 64) if tiny else (12, 128, 4096, 8960)
    with torch.device(device):
        model = WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=width, text_dim=text, ffn_dim=ffn, num_layers=4
        )

    def arguments(rows: int, size: int) -> dict[str, torch.Tensor]:
        return {
            "hidden_states": torch.randn(rows, 16, 5, size // 8, size // 8),
            "timestep": torch.rand(rows),
            "encoder_hidden_states": torch.randn(rows, 512 if not tiny else 8, text),
        }

    return model, arguments, (256, 480, 832) if not tiny else (32, 48, 64)


def sdxl(tiny: bool, device: str) -> tuple[nn.Module, Arguments, tuple[int, ...]]:
    from diffusers import UNet2DConditionModel

    channels, heads, text = ((32, 64, 64), (2, 4, 4), 32) if tiny else ((320, 640, 1280), (5, 10, 20), 2048)
    with torch.device(device):
        model = UNet2DConditionModel(
            block_out_channels=channels, attention_head_dim=heads, cross_attention_dim=text,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 4 if not tiny else 2), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip

    def arguments(rows: int, size: int) -> dict[str, Any]:
        added = {"text_embeds": torch.randn(rows, 1280), "time_ids": torch.ones(rows, 6)}
        return {
            "sample": torch.randn(rows, 4, size // 8, size // 8),
            "timestep": torch.tensor(500.0),
            "encoder_hidden_states": torch.randn(rows, 77, text),
            "added_cond_kwargs": added,
        }

    return model, arguments, (512, 768, 1024) if not tiny else (64, 96, 128)


MODELS = {"flux": flux, "wan": wan, "sdxl": sdxl}


class Phase:
    """One denoiser in a process of its own, and what was measured of it."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.device, self.lock = args.device, args.lock
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        torch.set_default_dtype(dtype)
        self.module, self._arguments, self.sizes = MODELS[name](args.tiny, args.device)
        self.module.eval()
        self.num = 0
        self.said: dict[str, Any] = {}

    def arguments(self, rows: int, size: int) -> dict[str, Any]:
        with torch.device(self.device):
            return self._arguments(rows, size)

    def first(self, rows: int, size: int) -> float:
        """Seconds of a forward that may compile."""
        kwargs = self.arguments(rows, size)
        self.wait()
        start = time.perf_counter()
        self.module(**kwargs)
        self.wait()
        return round(time.perf_counter() - start, 2)

    def ms(self, rows: int, size: int) -> float:
        """Of a forward, while no other process is timed."""
        kwargs = self.arguments(rows, size)
        self.module(**kwargs)
        times = []
        with Path(self.lock).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for _ in range(7):
                self.wait()
                start = time.perf_counter()
                self.module(**kwargs)
                self.wait()
                times.append(time.perf_counter() - start)
        return round(statistics.median(times) * 1e3, 2)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def compile(self) -> None:
        compile_components({"denoiser": self.module})

    def firsts(self) -> None:
        """All rows and sizes, in the order of a server that was alone at first."""
        middle = self.sizes[1]
        self.said["first_s"] = {f"{rows}x{middle}": self.first(rows, middle) for rows in (1, 2)}
        self.said["graphs_after_two"] = self.num
        others = {
            f"{r}x{s}": self.first(r, s) for s in self.sizes for r in ROWS if (r, s) not in ((1, middle), (2, middle))
        }
        self.said["others_max_s"] = max(others.values())
        self.said["slow_others"] = {name: took for name, took in others.items() if took > 0.5}
        self.said["graphs"] = self.num
        self.said["cache_hits_misses"] = graphs_of_cache()

    @contextmanager
    def counting(self) -> Iterator[None]:
        def started() -> None:
            self.num += 1

        with watched_compilations(started, lambda: None):
            yield


def cold(phase: Phase) -> None:
    shapes = [(rows, size) for size in phase.sizes for rows in (1, 2)]
    phase.said["eager_ms"] = {f"{r}x{s}": phase.ms(r, s) for r, s in shapes}
    expected = phase.module(**(kwargs := phase.arguments(1, phase.sizes[1])))[0]
    phase.compile()
    with phase.counting():
        phase.firsts()
    phase.said["compiled_ms"] = {f"{r}x{s}": phase.ms(r, s) for r, s in shapes}
    made = phase.module(**kwargs)[0]
    phase.said["differs"] = round(float((made - expected).norm() / expected.norm()), 6)


def warm(phase: Phase) -> None:
    phase.compile()
    with phase.counting():
        phase.firsts()


def served(phase: Phase) -> None:
    """Calls of one row and two, one after the other, while a process compiles for them; then of all rows and sizes."""
    runtime, middle = Runtime(), phase.sizes[1]
    cache = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    runtime.swap = Swap({phase.module: "denoiser"}, compiling=phase.counting, cache=cache)

    def call(rows: int, size: int) -> float:
        kwargs = phase.arguments(rows, size)
        phase.wait()
        start = time.perf_counter()
        runtime.run(Invocation(phase.module, "forward", kwargs=kwargs))
        phase.wait()
        return round(time.perf_counter() - start, 3)

    slow: dict[str, list[float]] = {}
    before_s = time.perf_counter()
    for rows in (1, 2):
        while True:
            took = call(rows, middle)
            if runtime.variant == "compiled" and rows in slow.setdefault("compiled", []):
                break
            if runtime.variant == "compiled":
                slow["compiled"].append(rows)
            if took > 0.3:
                slow.setdefault(f"rows {rows}", []).append(took)
            time.sleep(0.01)
        phase.said[f"after_rows_{rows}_s"] = round(time.perf_counter() - before_s, 1)
    phase.said["slow_calls_s"] = slow
    phase.said["graphs_after_two"] = phase.num
    others = {(rows, size): call(rows, size) for size in phase.sizes for rows in ROWS}
    phase.said["eager_others"] = [f"{r}x{s}" for r, s in others if call(r, s) and runtime.variant != "compiled"]
    phase.said["graphs"], phase.said["others_max_s"] = phase.num, max(others.values())
    phase.said["cache_hits_misses"] = graphs_of_cache()
    phase.said["notes"] = dict(runtime.swap._states)
    kwargs = phase.arguments(1, middle)
    for name, is_exact in (("swapped_ms", False), ("exact_ms", True)):
        times = []
        for _ in range(9):
            phase.wait()
            start = time.perf_counter()
            runtime.run(Invocation(phase.module, "forward", kwargs=kwargs, is_exact=is_exact))
            phase.wait()
            times.append(time.perf_counter() - start)
        phase.said[name] = round(statistics.median(times) * 1e3, 2)
    runtime.close()


def aside(phase: Phase) -> None:
    start = time.perf_counter()
    jobs = []
    for rows in (1, 2):
        with Watch(regions(phase.module)) as watch:
            phase.module(**phase.arguments(rows, phase.sizes[1]))
        jobs += watch.jobs()
    phase.said["observe_s"] = round(time.perf_counter() - start, 2)
    phase.said["jobs"], phase.said["jobs_bytes"] = len(jobs), sum(len(job.module) + len(job.arguments) for job in jobs)
    free = torch.cuda.mem_get_info()[0] if phase.device == "cuda" else 0
    start, least, slowest = time.perf_counter(), free, 0.0
    with CompilerProcess(jobs) as process:
        while process.result() is None:
            slowest = max(slowest, phase.first(1, phase.sizes[1]))
            least = min(least, torch.cuda.mem_get_info()[0] if free else 0)
            time.sleep(0.1)
        result = process.result()
    phase.said["aside_s"] = round(time.perf_counter() - start, 1)
    phase.said["result"] = repr(result)
    phase.said["aside_gb"] = round((free - least) / 1e9, 2)
    phase.said["slowest_eager_s"] = slowest
    phase.compile()
    with phase.counting():
        phase.firsts()


PHASES = {"cold": cold, "warm": warm, "aside": aside, "served": served}


def run_phase(args: argparse.Namespace) -> None:
    with torch.no_grad():
        phase = Phase(args.model, args)
        try:
            PHASES[args.phase](phase)
        except Exception as error:  # noqa: BLE001 - the other phases go on
            import traceback

            traceback.print_exc()
            phase.said["error"] = repr(error)[:500]
    print(json.dumps(phase.said))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script")
    parser.add_argument("--models", default="flux,wan,sdxl")
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--lock", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="writes FILE.json and FILE.md")
    args = parser.parse_args()
    if args.phase:
        run_phase(args)
        return
    folder = Path(tempfile.mkdtemp(prefix="sgld-bench-"))
    report: dict[str, Any] = {**reports.where(args.device), "rows": {}}
    for phase in args.phases.split(","):
        processes = {}
        for model in args.models.split(","):
            cache = folder / model / (phase if phase in ("aside", "served") else "own")
            command = [sys.executable, __file__, "--phase", phase, "--model", model, "--device", args.device]
            command += ["--lock", str(folder / "lock"), *(["--tiny"] if args.tiny else [])]
            env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
            processes[model] = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        for model, process in processes.items():
            said = process.communicate()[0].strip().splitlines()
            row = json.loads(said[-1]) if said else {"error": "no answer"}
            report["rows"][f"{model} {phase}"] = row
            print(model, phase, json.dumps(row), flush=True)
        if args.out:
            reports.write_rows(
                args.out, report, "What does compiling cost the server that does it, and one that has a process do it?"
            )


if __name__ == "__main__":
    main()
