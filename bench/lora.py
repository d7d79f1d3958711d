"""What do LoRA adapters cost a forward, and do requests with different ones share it?

python bench/lora.py [--out bench/results/lora_gpu]

A Flux transformer of full width with random weights in bf16, a fifth of its layers deep: 4 and 8 blocks. Adapters of
rank 16 on all attention and feed-forward layers. Forwards of n requests through sgld's executor, with its proofs:
without adapters, with one for all, and with a different one for each. On a CPU it is a small model, to see that it
runs.
"""

import argparse
import json
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too

import reports
import torch
from diffusers import FluxTransformer2DModel

from sgld.models.lora import LoraLayer
from sgld.outcome import Value
from sgld.worker.calls import Call, current_context
from sgld.worker.clock import device_clock
from sgld.worker.executor import Executor
from sgld.worker.slots import Applied, Slots

RANK = 16
NUM_ROWS = (1, 2, 4)
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "proj", "net.2", "proj_out")
SMALL: dict[str, Any] = {
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}


class Bench:
    """The model with adapters in slots, and an executor that runs calls of it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.is_gpu else torch.float32
        torch.manual_seed(0)
        with device:
            sizes = {} if self.is_gpu else SMALL
            model = FluxTransformer2DModel(num_layers=4, num_single_layers=8, guidance_embeds=True, **sizes)
        self.model: Any = model.to(self.dtype).eval()
        self.slots = Slots(self.model, device)
        self.num_layers = 0
        for key in map(str, range(max(NUM_ROWS))):
            self.slots.put(key, self._adapter())
        self.executor = Executor(clock=device_clock("cuda" if self.is_gpu else "cpu"))

    def _adapter(self) -> dict[str, list[tuple[LoraLayer, float]]]:
        made = {}
        for name, module in self.model.named_modules():
            if "blocks" in name and name.endswith(ADAPTED) and isinstance(module, torch.nn.Linear):
                down = torch.randn(RANK, module.in_features, device=self.device) / module.in_features**0.5
                up = 0.2 * torch.randn(module.out_features, RANK, device=self.device) / RANK**0.5
                made[name] = [(LoraLayer(down, up), 1.0)]
        self.num_layers = len(made)
        return made

    def calls(self, size: int, keys: list[str | None]) -> list[Call]:
        """A call for each key: requests of one size at one timestep."""
        config, side = self.model.config, size // 16
        place: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        shared = {
            "img_ids": torch.zeros(side * side, 3, **place),
            "txt_ids": torch.zeros(64, 3, **place),
            "return_dict": False,
        }
        made = []
        for key in keys:
            kwargs = {
                "hidden_states": torch.randn(1, side * side, config.in_channels, **place),
                "encoder_hidden_states": torch.randn(1, 64, config.joint_attention_dim, **place),
                "pooled_projections": torch.randn(1, config.pooled_projection_dim, **place),
                "timestep": torch.full((1,), 0.5, **place),
                "guidance": torch.full((1,), 3.5, device=self.device),
                **shared,
            }
            call = Call("request", "transformer", self.model, "forward", (), kwargs, current_context())
            call.adapters = Applied(self.slots, key) if key is not None else None
            made.append(call)
        return made

    def row(self, size: int, keys: list[str | None], repeats: int) -> dict[str, Any]:
        """Median time of a forward of these calls, and how far it is from single ones."""
        calls = self.calls(size, keys)
        alone = [call.run(call.args, call.kwargs)[0] for call in calls]
        ticks = [self.executor.run(calls) for _ in range(repeats + 3)]
        last = ticks[-1]
        last.span.wait()
        assert last.is_merged or len(calls) == 1, self.executor.verdicts.reasons
        values = [outcome.value[0] for outcome in last.outcomes if isinstance(outcome, Value)]
        errors = [float((v - a).float().norm() / a.float().norm()) for v, a in zip(values, alone, strict=True)]
        return {
            "ms": round(1000 * statistics.median(tick.span.elapsed_s for tick in ticks[3:]), 2),
            "error": float(f"{max(errors):.2g}"),
        }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device)
    sizes = (512, 1024) if bench.is_gpu else (64,)
    rows = []
    for size in sizes:
        for num in NUM_ROWS:
            different: list[str | None] = [str(i) for i in range(num)]
            kinds: dict[str, list[str | None]] = {"none": [None] * num, "one": ["0"] * num, "different": different}
            rows.append(
                {"size": size, "requests": num} | {n: bench.row(size, k, args.repeats) for n, k in kinds.items()}
            )
            print(rows[-1], flush=True)
    machine = torch.cuda.get_device_name() if bench.is_gpu else "CPU"
    report = {
        "machine": f"{machine}; torch {torch.__version__}, diffusers {version('diffusers')}",
        "num_layers": bench.num_layers,
        "slot_mb": round(bench.slots.size_bytes / 1e6),
        "rows": rows,
    }
    if args.out is not None:
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
        args.out.with_suffix(".md").write_text(_as_markdown(report))


def _as_markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Forwards with LoRA adapters",
        "",
        "`python bench/lora.py`",
        "",
        f"{report['machine']}. A Flux transformer of full width with 4 and 8 blocks, bf16, random weights; adapters",
        f"of rank {RANK} on {report['num_layers']} layers, {max(NUM_ROWS)} of them in slots of {report['slot_mb']} MB.",
        "Median of a forward, ms; errors are relative, against single forwards.",
        "",
    ]
    ways = ("none", "one", "different")
    cells = (
        (
            row["size"],
            row["requests"],
            *(row[way]["ms"] for way in ways),
            row["none"]["error"],
            row["different"]["error"],
        )
        for row in report["rows"]
    )
    head = ["size", "requests", "without", "one for all", "one each", "error without", "error with one each"]
    lines += reports.table(head, cells)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
