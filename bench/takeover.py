"""For how long is a request held up while compiled code is taken over?

FLUX's denoiser with real widths, few layers and random weights. One process compiles for one row and for two. Then
another one, which begins with that cache, runs forwards one after the other as a rank does: until they run compiled,
and a while longer. The longest pause between two of them, and how long one took before, while code was read, and after.

    python bench/takeover.py --out bench/results/takeover_gpu

`--tiny --device cpu` tries it out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too

import reports
import torch
from compilation import MODELS

from sgld.worker.graphs import graphs_on
from sgld.worker.invocation import Invocation
from sgld.worker.runtime import Runtime
from sgld.worker.swap import Swap

SETTLED = 40
"""So many forwards in a row that run as they will."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Forwards of one row until they run compiled, then of two."""
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.bfloat16 if args.device == "cuda" else torch.float32)
    module, arguments, sizes = MODELS[args.model](args.tiny, args.device)
    notes: list[str] = []
    graphs = graphs_on(torch.device(args.device), 2**32, {"denoiser": module}, lambda _, note: notes.append(note))
    runtime = Runtime(graphs=graphs)
    swap = runtime.swap = Swap(
        {module: "denoiser"},
        note=lambda _, note: notes.append(note),
        changed=runtime.forget,
        cache=Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]),
    )
    said: dict[str, Any] = {}
    if args.idle:
        # A rank that has no requests yet.
        swap.expect()
        start = time.perf_counter()
        while runtime.is_code_pending:
            runtime.look()
            time.sleep(0.02)
        said["read_while_idle_s"] = round(time.perf_counter() - start, 2)
    for rows in args.rows:
        with torch.device(args.device):
            kwargs = arguments(rows, sizes[args.size])
        said[f"{rows} rows"] = forwards(runtime, module, kwargs, args)
    runtime.close()
    return said | {"notes": notes}


def forwards(
    runtime: Runtime, module: torch.nn.Module, kwargs: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    steps: dict[str, list[float]] = {}
    ended, num_settled, longest_s = time.perf_counter(), 0, 0.0
    begin = ended
    while num_settled < SETTLED and ended < begin + args.limit_s:
        was_pending = runtime.is_code_pending
        runtime.look()
        runtime.run(Invocation(module, "forward", kwargs=dict(kwargs), fixed=()))
        if args.device == "cuda":
            torch.cuda.synchronize()
        took, ended = time.perf_counter() - ended, time.perf_counter()
        stage = runtime.variant + (", code comes" if was_pending or runtime.is_code_pending else "")
        steps.setdefault(stage, []).append(took)
        num_settled = num_settled + 1 if stage in ("compiled", "compiled graph") else 0
        longest_s = max(longest_s, took)
    return {
        "longest_ms": round(longest_s * 1e3),
        "until_compiled_s": round(ended - begin, 1),
        "more_than_100_ms": [round(t * 1e3) for of in steps.values() for t in of if t > 0.1][:12],
        "steps": {
            stage: f"{len(of)} in {sum(of):.2f} s, median {statistics.median(of) * 1e3:.1f} ms"
            for stage, of in steps.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script")
    parser.add_argument("--model", default="flux", choices=MODELS)
    parser.add_argument(
        "--size", type=int, default=0, choices=range(3), help="the smallest of a model, or a larger one"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2], help="of a forward, one after the other")
    parser.add_argument("--limit-s", type=float, default=90.0, help="for one number of rows")
    parser.add_argument(
        "--runs", default="cold,warm,idle", help="cold: the compiler's process fills the cache meanwhile"
    )
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--idle", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="writes FILE.json and FILE.md")
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run(args)))
        return
    report: dict[str, Any] = {**reports.where(args.device), "rows": {}}
    with tempfile.TemporaryDirectory(prefix="sgld-bench-") as folder:
        for name in args.runs.split(","):
            command = [sys.executable, *sys.argv, "--run", name, *(["--idle"] if name == "idle" else [])]
            env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
            lines = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False).stdout.splitlines()
            report["rows"][name] = json.loads(lines[-1]) if lines else {"error": "no answer"}
            print(name, json.dumps(report["rows"][name]), flush=True)
    if args.out:
        reports.write_rows(args.out, report, "For how long is a request held up while compiled code is taken over?")


if __name__ == "__main__":
    main()
