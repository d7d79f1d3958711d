"""What does a forward take on one, two or four GPUs that share it, and several side by side?

python bench/degree_times.py [--device cuda] [--gpus 4] [--layers 19 38] [--out bench/results/degree_times]

FLUX with random weights; ranks as the engine has them with --elastic-sp, CUDA graphs included. The table is what
bench/degrees.py simulates with (`--table FILE.json`). Beside it: as many forwards as there are GPUs, each on one.
"""

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import reports
import torch
import torch.multiprocessing
from diffusers import FluxTransformer2DModel
from parallel import flux_arguments, made, median_ms

from sgld.config import EngineConfig
from sgld.ipc.seats import Seat, seats
from sgld.models.load import LoadedModel
from sgld.models.sharing import Sharing
from sgld.parallel import ParallelConfig, Ranks
from sgld.worker.comparison import relative_error
from sgld.worker.distributed import follow, lead
from sgld.worker.graphs import graphs_on
from sgld.worker.invocation import Invocation
from sgld.worker.runtime import Runtime

SIDES, ROWS = (512, 768, 1024, 1536), (1, 2, 4)
# A graph is captured with the third use, and compared with the next one.
NUM_WARM_UP, REPEATS = 5, 7
Row = dict[str, Any]


def several(kwargs: Row, rows: int) -> Row:
    """The arguments of so many requests."""
    shared = ("img_ids", "txt_ids")
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name not in shared}
    return kwargs | {name: value.repeat(rows, *[1] * (value.ndim - 1)) for name, value in tensors.items()}


def rank_main(seat: Seat, args: argparse.Namespace, results: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    device = torch.device(args.device, seat.index) if args.device == "cuda" else torch.device("cpu")
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    if device.type == "cuda":
        torch.cuda.set_device(device)
    double, single = args.layers
    make = functools.partial(
        FluxTransformer2DModel, num_layers=double, num_single_layers=single, num_attention_heads=24 // args.scale
    )
    part = made(make, device, dtype)
    degrees = {"transformer": seat.num_ranks}
    sharing = Sharing(denoisers=("transformer",), max_degrees=degrees)
    model = LoadedModel(SimpleNamespace(components={"transformer": part}), device, {}, "bench", sharing=sharing)
    config = EngineConfig(parallel=ParallelConfig(num_gpus=seat.num_ranks, elastic_sp=True))
    with torch.no_grad():
        if seat.index:
            follow(seat, model, config)
        else:
            measure(seat, model, config, args, dtype, results)


def measure(
    seat: Seat, model: LoadedModel, config: EngineConfig, args: argparse.Namespace, dtype: torch.dtype, results: Any
) -> None:
    """Each size, number of rows and degree; what fails is said, and the rest goes on."""
    device, part = model.device, model.pipeline.components["transformer"]
    note = functools.partial(print, file=sys.stderr)
    runtime = Runtime(graphs=graphs_on(device, config.graphs.max_bytes, model.pipeline.components, note))
    leader: Any = lead(seat, model, config, note)
    runtime.ranks = leader
    for side in [side // args.scale for side in args.sides]:
        for rows in args.rows:
            torch.manual_seed(1)
            kwargs = several(flux_arguments(side, device, dtype), rows)

            def run(ranks: Ranks, kwargs: Row = kwargs) -> Any:
                with leader.on(ranks):
                    return runtime.run(Invocation(part, "forward", (), dict(kwargs), fixed=()))

            whole = run(Ranks())
            for degree in config.parallel.degrees:
                measured = functools.partial(run, Ranks(0, degree))
                error = relative_error(measured(), whole)
                row = {"side": side, "rows": rows, "degree": degree, "error": error}
                results.put(row | timed(measured, device, runtime))
            if rows == 1:
                beside = functools.partial(all_at_once, run, seat.num_ranks)
                results.put({"side": side, "beside": seat.num_ranks} | timed(beside, device, runtime))
    for wire in seat.wires:
        wire.close()


def all_at_once(run: Callable[[Ranks], Any], num_ranks: int) -> None:
    """A forward on each rank, those of others first."""
    away = [run(Ranks(rank, 1)) for rank in range(1, num_ranks)]
    run(Ranks())
    for each in away:
        each.result()


def timed(run: Callable[[], Any], device: torch.device, runtime: Runtime) -> Row:
    repeats = REPEATS if device.type == "cuda" else 1
    for _ in range(NUM_WARM_UP if device.type == "cuda" else 0):
        run()
    return {"seconds": median_ms(run, device, repeats) / 1e3, "variant": runtime.variant}


def spawned(args: argparse.Namespace) -> list[Row]:
    """What the ranks measured."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        with seats(args.gpus, f"{folder}/store") as every:
            ranks = [context.Process(target=rank_main, args=(seat, args, results)) for seat in every]
            for rank in ranks:
                rank.start()
        for rank in ranks:
            rank.join(args.limit_s)
            if rank.exitcode is None:
                rank.kill()
    rows: list[Row] = []
    while not results.empty():
        rows.append(results.get())
    return rows


def as_text(report: Row) -> str:
    degrees = sorted({row["degree"] for row in report["rows"]})
    lines = [
        "# A forward on one, two or four GPUs",
        "",
        f"`{report['command']}`",
        "",
        f"{report['machine']}. Median forward, ms; how it ran. Error: relative, of all GPUs against one. Beside one "
        f"another: a forward of one request on each GPU, until the last one has come back to the first GPU.",
        "",
        "| size | requests | " + " | ".join(f"{degree} GPUs" for degree in degrees) + " | error | beside one another |",
        "|---" * (len(degrees) + 4) + "|",
    ]
    beside = {row["side"]: f"{1e3 * row['seconds']:.1f}" for row in report["beside"]}
    for side, rows in dict.fromkeys((row["side"], row["rows"]) for row in report["rows"]):
        own = {row["degree"]: row for row in report["rows"] if (row["side"], row["rows"]) == (side, rows)}
        cells = [f"{1e3 * own[d]['seconds']:.1f} ({own[d]['variant']})" if d in own else "" for d in degrees]
        error = max(row["error"] for row in own.values())
        last = beside.get(side, "") if rows == 1 else ""
        lines.append(f"| {side}² | {rows} | {' | '.join(cells)} | {error:.1g} | {last} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--layers", type=int, nargs=2, default=(19, 38), help="with two streams, and with one")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--scale", type=int, default=1, help="divides widths and sizes, to try it out")
    parser.add_argument("--limit-s", type=float, default=500.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = spawned(args)
    report = {
        "command": reports.command(),
        **reports.where(args.device),
        "rows": [row for row in found if "degree" in row],
        "beside": [row for row in found if "beside" in row],
    }
    text = as_text(report)
    print(text)
    if args.out is not None:
        reports.write(args.out, report, text)


if __name__ == "__main__":
    main()
