"""How much of the device's arithmetic do denoisers reach, eager, compiled, and replayed as a graph?

    python bench/roofline.py --out bench/results/roofline_gpu [--rows flux-1024 wan-81f-480p ...]

The roof is what a product of two 8192² matrices in bf16 reaches in this run. Pipelines of real size with random weights
are made in memory (bench/real_models.py); their denoiser's first call is kept and repeated. Operations are those of
matrix products, convolutions and attention, as torch.utils.flop_counter counts them in the eager forward.
bench/compare.py says the same of whole steps inside the engine. `--tiny --device cpu` tries it out.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too
os.environ.setdefault("TQDM_DISABLE", "1")

import reports
import torch
from budget import Budget
from real_models import MODELS
from rows import ROWS, Row, tiny
from torch.utils.flop_counter import FlopCounterMode

_ROWS = ("flux-256", "flux-512", "flux-1024", "wan-17f-256", "wan-81f-480p", "sdxl-512", "sdxl-1024")
ROOF_SIDE = 8192
_REPEATS = 7


class _Called(Exception):
    """The first call is there: the rest of the pipeline isn't needed."""


def roof_tflops(device: str, side: int) -> float:
    """What a product of square matrices reaches in bf16; TFLOP/s."""
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    return 2.0 * side * side * side / seconds(lambda: a @ b, device) / 1e12


def seconds(run: Callable[[], Any], device: str, repeats: int = _REPEATS) -> float:
    """The median of some runs, on the device's clock; the first two don't count."""
    taken: list[float] = []
    for _ in range(repeats + 2):
        if device == "cuda":
            before, after = moment(), moment()
            before.record()
            run()
            after.record()
            torch.cuda.synchronize()
            taken.append(before.elapsed_time(after) / 1e3)
        else:
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return float(statistics.median(taken[2:]))


def moment() -> Any:
    """A moment of the device, to be recorded."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def step_tflop(pipeline: Any, denoiser: torch.nn.Module, request: dict[str, Any]) -> float:
    """Operations of all calls of the denoiser in one step, 10^12."""
    total = 0
    forward = denoiser.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal total
        with FlopCounterMode(display=False) as counter:
            output = forward(*args, **kwargs)
        total += counter.get_total_flops()
        return output

    with _exchanged(denoiser, counted):
        pipeline(**_kwargs(request, 1), output_type="latent")
    return total / 1e12


def first_call(pipeline: Any, denoiser: torch.nn.Module, request: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """The arguments of the denoiser's first call."""
    found: list[Any] = []

    def stop(*args: Any, **kwargs: Any) -> Any:
        found.extend((args, kwargs))
        raise _Called

    with _exchanged(denoiser, stop):
        try:
            pipeline(**_kwargs(request, 2), output_type="latent")
        except _Called:
            return found[0], found[1]
    raise AssertionError("the pipeline doesn't call its denoiser")


class _exchanged:  # noqa: N801 - used as a function
    """Another forward, for a while."""

    def __init__(self, module: torch.nn.Module, forward: Callable[..., Any]) -> None:
        self._module, self._forward = module, forward

    def __enter__(self) -> None:
        self._module.forward = self._forward

    def __exit__(self, *_: object) -> None:
        del self._module.forward


def _kwargs(request: dict[str, Any], num_steps: int) -> dict[str, Any]:
    return {**{k: v for k, v in request.items() if k != "seed"}, "num_inference_steps": num_steps}


def graph_of(run: Callable[[], Any]) -> Callable[[], None]:
    """The same kernels, launched together."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(row: Row, pipeline: Any, device: str, *, compiles: bool) -> dict[str, Any]:
    """Milliseconds of a forward, each way, and its operations."""
    model = MODELS[row.model]
    denoiser = getattr(pipeline, model.denoiser)
    args, kwargs = first_call(pipeline, denoiser, row.request(0, model.call))

    def run() -> Any:
        return denoiser(*args, **kwargs)

    with FlopCounterMode(display=False) as counter:
        run()
    found = {"row": row.name, "tflop": counter.get_total_flops() / 1e12}
    found["eager"] = 1e3 * seconds(run, device)
    if device == "cuda":
        found["graph"] = 1e3 * seconds(graph_of(run), device)
    if compiles:
        denoiser.compile_repeated_blocks(fullgraph=True, dynamic=True)
        start = time.perf_counter()
        run()
        found["compile_s"] = time.perf_counter() - start
        found["compiled"] = 1e3 * seconds(run, device)
        if device == "cuda":
            found["graph of compiled"] = 1e3 * seconds(graph_of(run), device)
        for module in denoiser.modules():
            module._compiled_call_impl = None
    return found


_WAYS = ("eager", "graph", "compiled", "graph of compiled")


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = ["# How much of the device's arithmetic do denoisers reach?", "", f"`{report['command']}`", ""]
    lines += [f"{report['machine']}; {reports.versions(report)}. The roof: {report['roof_tflops']:.0f} TFLOP/s."]
    lines += ["Milliseconds of one forward of the denoiser, and the share of the roof.", ""]
    cells = []
    for found in report["rows"]:
        shares = [f"{found[way]:.1f} ({share(report, found, way):.0%})" if way in found else "" for way in _WAYS]
        cells.append((found["row"], f"{found['tflop']:.2f}", *shares))
    lines += reports.table(["forward", "TFLOP", *_WAYS], cells)
    return "\n".join(lines) + "\n"


def share(report: dict[str, Any], found: dict[str, Any], way: str) -> float:
    """Of the roof."""
    return float(found["tflop"] / found[way] * 1e3 / report["roof_tflops"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(_ROWS))
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--seconds", type=float, help="rows that no longer fit are left out")
    parser.add_argument("--tiny", action="store_true", help="models with next to no layers, to try the script")
    parser.add_argument("--out", type=Path, help="writes FILE.json and FILE.md, after each row")
    args = parser.parse_args()
    budget = Budget(args.seconds)
    torch.set_grad_enabled(False)
    roof = roof_tflops(args.device, 256 if args.tiny else ROOF_SIDE)
    report = {"command": reports.command(), **reports.where(args.device), "roof_tflops": roof, "rows": []}
    chosen: Sequence[Row] = [tiny(ROWS[name]) if args.tiny else ROWS[name] for name in args.rows]
    for model in dict.fromkeys(row.model for row in chosen):
        if not budget.has(0):
            break
        pipeline = MODELS[model].build(is_tiny=args.tiny, device=args.device)
        pipeline.set_progress_bar_config(disable=True)
        for row in budget.as_many(row for row in chosen if row.model == model):
            report["rows"].append(measure(row, pipeline, args.device, compiles=not args.no_compile))
            print(report["rows"][-1], flush=True)
            if args.out:
                reports.write(args.out, report, table(report))
        del pipeline
        if args.device == "cuda":
            torch.cuda.empty_cache()
    print(table(report))


if __name__ == "__main__":
    main()
