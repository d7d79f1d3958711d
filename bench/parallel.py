"""What do two GPUs gain on one forward: tokens shared by Ulysses, halves of guidance, tiles of a VAE?

python bench/parallel.py [--device cuda] [--scale 1] [--kinds tokens rows tiles] [--out bench/results/parallel_gpu]

Models of real width with fewer layers and random weights; ranks as the engine has them. Beside them plain diffusers'
own context parallelism in the same processes. Eager code; of each number the median of several forwards counts.
"""

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import reports
import torch
import torch.distributed as dist
import torch.multiprocessing
from diffusers import AutoencoderKL, ContextParallelConfig, FluxTransformer2DModel, WanTransformer3DModel

from sgld.config import EngineConfig
from sgld.ipc.seats import Seat
from sgld.models.load import LoadedModel
from sgld.models.sharing import Sharing
from sgld.parallel import ParallelConfig
from sgld.worker.axes import hypothesis
from sgld.worker.comparison import relative_error
from sgld.worker.distributed import follow, lead
from sgld.worker.invocation import Invocation
from sgld.worker.rows import RowAxes, row_axes
from sgld.worker.runtime import Runtime

NUM_RANKS, REPEATS = 2, 7
Row = dict[str, Any]
TEXT = 512


def flux(scale: int) -> Any:
    return FluxTransformer2DModel(num_layers=3, num_single_layers=5, num_attention_heads=24 // scale)


def flux_arguments(side: int, device: torch.device, dtype: torch.dtype) -> Row:
    tokens = (side // 16) ** 2
    return {
        "hidden_states": torch.randn(1, tokens, 64, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, TEXT, 4096, device=device, dtype=dtype),
        "pooled_projections": torch.randn(1, 768, device=device, dtype=dtype),
        "timestep": torch.tensor([0.5], device=device, dtype=dtype),
        "img_ids": torch.zeros(tokens, 3, device=device, dtype=dtype),
        "txt_ids": torch.zeros(TEXT, 3, device=device, dtype=dtype),
        "return_dict": False,
    }


def wan(scale: int) -> Any:
    return WanTransformer3DModel(num_attention_heads=12 // scale, attention_head_dim=128, num_layers=8, ffn_dim=8960)


def wan_arguments(size: tuple[int, int, int], rows: int, device: torch.device, dtype: torch.dtype) -> Row:
    frames, height, width = size
    return {
        "hidden_states": torch.randn(
            rows, 16, (frames - 1) // 4 + 1, height // 8, width // 8, device=device, dtype=dtype
        ),
        "timestep": torch.full((rows,), 500, device=device),
        "encoder_hidden_states": torch.randn(rows, TEXT, 4096, device=device, dtype=dtype),
        "return_dict": False,
    }


def vae(scale: int) -> Any:
    widths = tuple(n // scale for n in (128, 256, 512, 512))
    return AutoencoderKL(
        block_out_channels=widths,
        latent_channels=16,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=512,
    )


def calls(
    scale: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, str, Callable[[], Any], str, Row]]:
    """Name, kind, model, method and arguments of what is measured."""
    for side in (1024 // scale, 1536 // scale):
        yield f"FLUX, 8 layers, {side}²", "tokens", lambda: flux(scale), "forward", flux_arguments(side, device, dtype)
    for frames in (33, 81) if scale == 1 else (9,):
        size = (frames, 480 // scale, 832 // scale)
        name = f"Wan, 8 layers, {'x'.join(map(str, size))}"
        yield name, "tokens", lambda: wan(scale), "forward", wan_arguments(size, 1, device, dtype)
    size = (33 if scale == 1 else 5, 480 // scale, 832 // scale)
    name = f"Wan, 8 layers, {'x'.join(map(str, size))}, guidance"
    yield name, "rows", lambda: wan(scale), "forward", wan_arguments(size, 2, device, dtype)
    side = 2048 // scale
    latents = torch.randn(1, 16, side // 8, side // 8, device=device, dtype=dtype)
    yield f"VAE, {side}² in tiles", "tiles", lambda: vae(scale), "decode", {"z": latents}


def median_ms(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    taken = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken[2:])


def made(make: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """The same model on each rank."""
    torch.manual_seed(0)
    with torch.device(device):
        return make().to(dtype).eval()


def rank_main(seat: Seat, kind: str, scale: int, device_type: str, results: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    device = torch.device(device_type, seat.index) if device_type == "cuda" else torch.device("cpu")
    dtype = torch.bfloat16 if device_type == "cuda" else torch.float32
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(1)
    chosen = [call for call in calls(scale, device, dtype) if call[1] == kind]
    names = {name.partition(",")[0]: make for name, _, make, _, _ in chosen}
    parts = {name: made(make, device, dtype) for name, make in names.items()}
    if kind == "tiles":
        parts["VAE"].enable_tiling()
    sharing = Sharing(denoisers=tuple(parts)) if kind != "tiles" else Sharing(vaes=tuple(parts))
    pipeline = SimpleNamespace(components=parts)
    model = LoadedModel(pipeline, device, {}, "bench", sharing=sharing)
    parallel = ParallelConfig(num_gpus=NUM_RANKS, enable_cfg_parallel=kind == "rows")
    config = EngineConfig(parallel=parallel)
    with torch.no_grad():
        if seat.index:
            follow(seat, model, config)
        else:
            measure(seat, model, config, chosen, results)
        if kind == "tokens":
            plain(seat, chosen, device, dtype, results)


def ran(run: Callable[[Invocation], Any], part: Any, method: str, kwargs: Row, axes: RowAxes | None = None) -> Any:
    return run(Invocation(part, method, (), dict(kwargs), axes=axes))


def measure(seat: Seat, model: LoadedModel, config: EngineConfig, chosen: list[Any], results: Any) -> None:
    """One GPU, then all; the hooks of the latter come with the leader."""
    runtime, device = Runtime(), model.device
    repeats = REPEATS if device.type == "cuda" else 1
    found: dict[str, Row] = {}
    whole = {}
    for name, kind, _, method, kwargs in chosen:
        part = model.pipeline.components[name.partition(",")[0]]
        run = functools.partial(ran, runtime.run_here, part, method, kwargs)
        whole[name] = run()
        found[name] = {"name": name, "kind": kind, "one_ms": median_ms(run, device, repeats)}
    runtime.ranks = lead(seat, model, config, lambda component, note: print(component, note, file=sys.stderr))
    for name, kind, _, method, kwargs in chosen:
        part = model.pipeline.components[name.partition(",")[0]]
        tree = ((), kwargs)
        axes = row_axes(hypothesis(tree), tree, tree) if kind == "rows" else None
        run = functools.partial(ran, runtime.run, part, method, kwargs, axes)
        run()
        error = relative_error(run(), whole[name])
        results.put({**found[name], "two_ms": median_ms(run, device, repeats), "error": error})
    for wire in seat.wires:
        wire.close()


def plain(seat: Seat, chosen: list[Any], device: torch.device, dtype: torch.dtype, results: Any) -> None:
    """What diffusers' own context parallelism takes."""
    if device.type != "cuda":
        return
    models = {}
    for name, _, make, _, kwargs in chosen:
        short = name.partition(",")[0]
        if short not in models:
            models[short] = made(make, device, dtype)
            models[short].enable_parallelism(config=ContextParallelConfig(ulysses_degree=NUM_RANKS))
        run = lambda short=short, kwargs=kwargs: models[short](**kwargs)  # noqa: E731
        dist.barrier()
        taken = median_ms(run, device, REPEATS)
        if seat.index == 0:
            results.put({"name": name, "diffusers_ms": taken})


def spawned(kind: str, scale: int, device_type: str) -> list[Row]:
    """What the ranks of one layout measured."""
    context = torch.multiprocessing.get_context("spawn")
    results, (here, there) = context.SimpleQueue(), Pipe()
    with tempfile.TemporaryDirectory() as folder:
        seats = [Seat(n, NUM_RANKS, f"{folder}/store", (wire,)) for n, wire in enumerate((here, there))]
        ranks = [context.Process(target=rank_main, args=(seat, kind, scale, device_type, results)) for seat in seats]
        for rank in ranks:
            rank.start()
        here.close()
        there.close()
        for rank in ranks:
            rank.join(180)
            if rank.exitcode is None:
                rank.kill()
    rows: dict[str, Row] = {}
    while not results.empty():
        row = results.get()
        rows.setdefault(row["name"], {}).update(row)
    return list(rows.values())


def as_text(report: Row) -> str:
    lines = [
        "# Two GPUs for one forward",
        "",
        f"`{report['command']}`",
        "",
        f"{report['machine']}. Median forward, ms. Error: relative, of two GPUs against one.",
        "",
        "| forward | shared | one GPU | two GPUs | gain | diffusers' context parallel | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        one, two = row.get("one_ms", float("nan")), row.get("two_ms", float("nan"))
        theirs = f"{row['diffusers_ms']:.1f}" if "diffusers_ms" in row else ""
        error = row.get("error", float("nan"))
        lines.append(
            f"| {row['name']} | {row.get('kind')} | {one:.1f} | {two:.1f} | {one / two:.2f}x | {theirs} | {error:.1g} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure each layout in processes of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divides widths and sizes, to try it out")
    parser.add_argument("--kinds", nargs="+", default=["tokens", "rows", "tiles"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for kind in args.kinds:
        rows += spawned(kind, args.scale, args.device)
        print(rows, file=sys.stderr, flush=True)
    report = {"command": reports.command(), **reports.where(args.device), "rows": rows}
    text = as_text(report)
    print(text)
    if args.out is not None:
        reports.write(args.out, report, text)


if __name__ == "__main__":
    main()
