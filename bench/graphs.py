"""What does a forward save that is replayed as a CUDA graph, and what does the host need for a replay?

python bench/graphs.py [--only flux sdxl] [--out bench/results/graphs]

Models of real sizes with random weights in bfloat16, one after the other, each run as the executor runs it: eagerly,
captured, compared with an eager forward, replayed.
"""

import argparse
import functools
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too

import diffusers
import reports
import torch
import transformers
from torch import nn

from sgld.worker.graph_policy import GraphPolicy
from sgld.worker.graphs import Graphs
from sgld.worker.invocation import Invocation
from sgld.worker.recorder import CudaRecorder

NUM_RUNS = 7
Arguments = dict[str, Any]
Shapes = dict[str, tuple[str, Callable[[], Arguments]]]
"""Of each row of the table, by name: the method, and what makes its arguments."""


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def sdxl() -> tuple[nn.Module, Shapes]:
    model = diffusers.UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )

    def arguments(rows: int, side: int) -> Arguments:
        return {
            "sample": randn(rows, 4, side, side),
            "timestep": torch.tensor(500.0, device="cuda"),
            "encoder_hidden_states": randn(rows, 77, 2048),
            "added_cond_kwargs": {"text_embeds": randn(rows, 1280), "time_ids": randn(rows, 6)},
            "return_dict": False,
        }

    sizes = [(2, 64), (8, 64), (2, 128), (8, 128)]
    return model, {f"SDXL {8 * n}², {b} rows": ("forward", functools.partial(arguments, b, n)) for b, n in sizes}


def flux() -> tuple[nn.Module, Shapes]:
    model = diffusers.FluxTransformer2DModel(guidance_embeds=True)

    def arguments(rows: int, side: int) -> Arguments:
        tokens = side * side
        return {
            "hidden_states": randn(rows, tokens, 64),
            "encoder_hidden_states": randn(rows, 512, 4096),
            "pooled_projections": randn(rows, 768),
            "timestep": torch.full((rows,), 0.5, device="cuda", dtype=torch.bfloat16),
            "guidance": torch.full((rows,), 3.5, device="cuda"),
            "img_ids": torch.zeros(tokens, 3, device="cuda", dtype=torch.bfloat16),
            "txt_ids": torch.zeros(512, 3, device="cuda", dtype=torch.bfloat16),
            "joint_attention_kwargs": {},
            "return_dict": False,
        }

    sizes = [(1, 16), (2, 16), (1, 32), (1, 64)]
    return model, {f"FLUX {16 * n}², {b} rows": ("forward", functools.partial(arguments, b, n)) for b, n in sizes}


def wan() -> tuple[nn.Module, Shapes]:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=128, text_dim=4096, ffn_dim=8960, num_layers=30
    )

    def arguments(rows: int, frames: int, height: int, width: int) -> Arguments:
        return {
            "hidden_states": randn(rows, 16, frames, height, width),
            "timestep": torch.full((rows,), 500, device="cuda"),
            "encoder_hidden_states": randn(rows, 512, 4096),
            "return_dict": False,
        }

    sizes = [(1, 5, 32, 32), (2, 5, 32, 32), (1, 9, 60, 104)]
    return model, {
        f"Wan {4 * f - 3}f {8 * h}x{8 * w}, {b} rows": ("forward", functools.partial(arguments, b, f, h, w))
        for b, f, h, w in sizes
    }


def vae() -> tuple[nn.Module, Shapes]:
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )

    def arguments(side: int) -> Arguments:
        return {"z": randn(1, 4, side, side), "return_dict": False}

    return model, {f"VAE decode {8 * n}²": ("decode", functools.partial(arguments, n)) for n in (32, 64, 128)}


def clip() -> tuple[nn.Module, Shapes]:
    config = transformers.CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    )

    def arguments() -> Arguments:
        return {"input_ids": torch.randint(0, 49000, (1, 77), device="cuda"), "output_hidden_states": True}

    return transformers.CLIPTextModelWithProjection(config), {"CLIP bigG": ("forward", arguments)}


def t5() -> tuple[nn.Module, Shapes]:
    config = transformers.T5Config(
        d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64, feed_forward_proj="gated-gelu"
    )

    def arguments() -> Arguments:
        return {"input_ids": torch.randint(0, 32000, (1, 512), device="cuda"), "output_hidden_states": False}

    return transformers.T5EncoderModel(config), {"T5-XXL, 512 tokens": ("forward", arguments)}


MODELS = {"sdxl": sdxl, "flux": flux, "wan": wan, "vae": vae, "clip": clip, "t5": t5}


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Of the median run, in ms: when the host was done, and when the device was."""
    times = []
    for _ in range(NUM_RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        launched = time.perf_counter()
        torch.cuda.synchronize()
        times.append((1e3 * (launched - start), 1e3 * (time.perf_counter() - start)))
    return statistics.median(host for host, _ in times), statistics.median(total for _, total in times)


def measured(name: str, model: nn.Module, method: str, arguments: Callable[[], Arguments]) -> dict[str, Any]:
    """One row of the table."""
    notes: list[str] = []
    policy: GraphPolicy[Any] = GraphPolicy(64 * 2**30)
    device = torch.device("cuda")
    graphs = Graphs(device, policy, CudaRecorder(device), {}, lambda _name, note: notes.append(note))
    forward = model if method == "forward" else getattr(model, method)

    def run() -> Any:
        return graphs.run(Invocation(model, method, kwargs=arguments_))

    arguments_ = arguments()
    forward(**arguments_)
    host, eager = timed(lambda: forward(**arguments_))
    row: dict[str, Any] = {"name": name, "eager_ms": eager, "eager_host_ms": host}
    run(), run()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    row["capture_ms"] = 1e3 * (time.perf_counter() - start)
    arguments_ = arguments()
    run()
    if policy.num_graphs:
        row["replay_host_ms"], row["replay_ms"] = timed(run)
        expected, replayed = forward(**arguments_), run()
        row["is_equal"] = bool(torch.equal(expected[0], replayed[0]))
        row["size_mib"] = policy.size_bytes / 2**20
        start = time.perf_counter()
        for _ in range(100):
            graphs.decide(graphs.key(Invocation(model, method, kwargs=arguments_))[0])
        row["key_us"] = 1e4 * (time.perf_counter() - start)
    row["note"] = "; ".join(notes)
    return row


def cell(row: dict[str, Any], name: str, form: str = ".1f") -> str:
    return format(row[name], form) if name in row else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--out", type=Path, help="writes FILE.json and FILE.md")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = []
    for name in args.only:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model, shapes = MODELS[name]()
        torch.set_default_dtype(torch.float32)
        model.eval()
        for shape, (method, arguments) in shapes.items():
            try:
                rows.append(measured(shape, model, method, arguments))
                print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            except RuntimeError:  # out of memory, as a rule; the others are worth seeing, too
                traceback.print_exc()
        del model, shapes
        torch.cuda.empty_cache()
    report = {"command": reports.command(), **reports.where("cuda"), "rows": rows}
    lines = ["# Forwards replayed as CUDA graphs", "", f"`{report['command']}`", ""]
    lines += [f"{report['machine']}; torch {version('torch')}, diffusers {version('diffusers')}. ms, medians.", ""]
    columns = {"eager_ms": "eager", "eager_host_ms": "its launches", "replay_ms": "replay"}
    columns |= {"replay_host_ms": "its launch", "capture_ms": "capture", "size_mib": "MiB"}
    forms = {"replay_host_ms": ".2f", "capture_ms": ".0f", "size_mib": ".0f"}
    cells = ((row["name"], *(cell(row, name, forms.get(name, ".1f")) for name in columns)) for row in rows)
    lines += reports.table(["forward", *columns.values()], cells)
    if args.out:
        reports.write(args.out, report, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
