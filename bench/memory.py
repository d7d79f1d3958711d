"""What do the options of memory and compilation save and cost: peak memory of the GPU, and time of a picture?

A Wan pipeline with half a T5-XXL, a transformer of 3 billion parameters, Wan 2.1's VAE and random weights in bf16, made
in memory. Each row runs 1024x1024 pictures of one frame with `--steps` steps: one to warm up, the median of two one
after the other, and four at once, by the code of the executor itself. `differs` is the largest difference of a picture
to that of the first row. Plain diffusers runs its four one after the other.

    python bench/memory.py --out bench/results/memory_gpu

`--tiny --device cpu` tries it out: there only times are measured, and what is moved goes from the CPU to itself. On an
H100 it should take three minutes; the report is written after each row.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too
os.environ.setdefault("TQDM_DISABLE", "1")
# A cold start: what compiling takes is a result, too.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="sgld-bench-")

import anyio
import msgspec
import reports
import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from sgld.config import EngineConfig, MemoryConfig
from sgld.engine.engine import Engine
from sgld.events import Completed, Failed
from sgld.models.placement import compile_components, decompile, place
from sgld.models.resolve import EMBEDDED
from sgld.models.roles import Role, places
from sgld.sampling_params import SamplingParams
from sgld.testing import run_together
from sgld.worker.residency import residency
from sgld.worker.runtime import Runtime

PROMPTS = ("sunset over the sea", "snowy mountains at dawn", "a red circle", "a blue square")
ROLES: dict[str, Role] = {"text_encoder": "text_encoder", "transformer": "dit", "vae": "vae"}
REAL: dict[str, Any] = {
    "text": {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 12, "num_heads": 64},
    "dit": {"num_attention_heads": 24, "attention_head_dim": 128, "ffn_dim": 12288, "num_layers": 20},
    "vae": {},
}
TINY: dict[str, Any] = {
    "text": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "dit": {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "num_layers": 2},
    "vae": {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
}


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """An option, and what was measured with it; no memory on a CPU."""

    name: str
    first_s: float
    """The first picture, with all that is compiled for it."""
    picture_s: float
    four_s: float
    """A picture, where four are made at once."""
    peak_gb: float | None
    differs: float


class Bench:
    """The pipeline, which is on the CPU between the rows."""

    def __init__(self, device: torch.device, sizes: dict[str, Any], steps: int, size: int) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        self.kwargs: dict[str, Any] = {
            "num_inference_steps": steps,
            "height": size,
            "width": size,
            "num_frames": 1,
            "guidance_scale": 1.0,
            "output_type": "pt",
        }
        self.expected: torch.Tensor | None = None
        self.rows: list[Row] = []
        self.pipeline = _pipeline(sizes, device)
        self.pipeline.set_progress_bar_config(disable=True)
        self._clear()

    def engine(self, name: str, memory: MemoryConfig, *, compiles: bool = False) -> None:
        """A row with options as `load` takes them."""
        config = EngineConfig(memory=memory)
        chosen, _, _ = places(ROLES, config, "cuda")
        pins = memory.pin_cpu_memory
        place(self.pipeline, chosen, self.device, pins=pins)
        parts = self.pipeline.components
        moved = residency(self.device, {n: parts[n] for n, where in chosen.items() if where == "offload"}, pins=pins)
        if compiles:
            compile_components({"transformer": parts["transformer"]})
        runtime = Runtime(moved, {parts["transformer"]: "transformer"} if compiles else {}, print)

        def run(calls: list[dict[str, Any]]) -> list[torch.Tensor]:
            outputs = run_together(self.pipeline, calls, runtime=runtime).outputs
            for output in outputs:
                if isinstance(output, BaseException):
                    raise output
            return [output.frames for output in outputs]

        self._measure(name, run)
        moved.make_room(torch.nn.Module())
        if compiles:
            decompile(parts["transformer"].modules())
        if "layerwise" not in chosen.values():  # those are on the CPU
            self.pipeline.to("cpu")
        self._clear()
        if self.is_gpu and "layerwise" not in chosen.values():
            left = torch.cuda.memory_allocated() / 1e9
            assert left < 0.1, f"{left:.1f} GB are left on the GPU"

    def plain(self, name: str) -> None:
        """A row of plain diffusers, which offloads all or nothing."""
        self.pipeline.enable_model_cpu_offload(device=self.device)
        self._measure(name, lambda calls: [self.pipeline(**kwargs).frames for kwargs in calls])
        self.pipeline.remove_all_hooks()
        self.pipeline.to("cpu")
        self._clear()

    def _measure(self, name: str, run: Callable[[list[dict[str, Any]]], list[torch.Tensor]]) -> None:
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        calls = [self.kwargs | {"prompt": prompt} for prompt in PROMPTS]

        def seconds(which: list[dict[str, Any]]) -> tuple[float, torch.Tensor]:
            seeded = [kwargs | {"generator": torch.Generator().manual_seed(0)} for kwargs in which]
            start = time.perf_counter()
            outputs = [output.float().cpu() for output in run(seeded)]
            return time.perf_counter() - start, outputs[0]

        first_s, picture = seconds(calls[:1])
        if self.expected is None:
            self.expected = picture
        singles = [seconds([call])[0] for call in calls[1:3]]
        # Twice: the first time merging is proved.
        seconds(calls)
        four_s = seconds(calls)[0]
        row = Row(
            name=name,
            first_s=round(first_s, 2),
            picture_s=round(statistics.median(singles), 3),
            four_s=round(four_s / len(calls), 3),
            peak_gb=round(torch.cuda.max_memory_allocated() / 1e9, 1) if self.is_gpu else None,
            differs=round(float((picture - self.expected).abs().max()), 6),
        )
        self.rows.append(row)
        print(row, flush=True)

    def _clear(self) -> None:
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()


async def served(memory: MemoryConfig, device: str) -> list[Any]:
    """Pictures of a model that ships, by an engine whose rank is a process of its own."""
    config = EngineConfig(model_path=str(EMBEDDED["sgld/tiny-image"]), device=device, memory=memory)  # type: ignore[arg-type]
    params = SamplingParams(prompt=PROMPTS[2], num_inference_steps=8, num_outputs_per_prompt=2, num_previews=1)
    async with Engine(config) as engine:
        print((await engine.ready()).decisions)
        events = [event async for event in engine.generate(params)]
    problems = [event.message for event in events if isinstance(event, Failed)]
    assert not problems, problems
    return [event.frames for event in events if isinstance(event, Completed)]


def served_difference(device: str) -> int:
    """Of 255: what offload changes in these."""
    ours = MemoryConfig(text_encoder_cpu_offload=True, vae_cpu_offload=True, dit_layerwise_offload=True)
    whole = MemoryConfig(text_encoder_cpu_offload=True, vae_cpu_offload=True, dit_cpu_offload=True)
    plain, *others = (anyio.run(served, memory, device) for memory in (MemoryConfig(), ours, whole))
    pairs = [pair for pictures in others for pair in zip(plain, pictures, strict=True)]
    return max(int(abs(one.astype(int) - other.astype(int)).max()) for one, other in pairs)


def _pipeline(sizes: dict[str, Any], device: torch.device) -> Any:
    """The pipeline on the CPU; its weights are drawn on the device, where that takes no time."""
    torch.manual_seed(0)
    tokenizer = DiffusionPipeline.from_pretrained(EMBEDDED["sgld/tiny-video"]).tokenizer
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        encoder = T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **sizes["text"])
        ).eval()
        encoder = encoder.to("cpu")
        transformer = WanTransformer3DModel(text_dim=sizes["text"]["d_model"], **sizes["dit"]).eval().to("cpu")
        vae = AutoencoderKLWan(**sizes["vae"]).eval().to("cpu")
    torch.set_default_dtype(torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return WanPipeline(tokenizer, encoder, vae, scheduler, transformer)


def table(report: dict[str, Any], rows: list[Row]) -> str:
    """The report for people."""
    lines = [
        "# What do offload and compilation save and cost?",
        "",
        f"`{report['command']}`",
        "",
        f"{report['machine']}; {reports.versions(report)}. Weights: {report['weights']}.",
        "",
        f"Served by `sgld/tiny-image` with all offload options: {report['served_difference']} of 255 from without.",
        "",
    ]
    cells = []
    for row in rows:
        peak = "" if row.peak_gb is None else f"{row.peak_gb:.1f}"
        times = (f"{row.picture_s:.2f}", f"{row.four_s:.2f}", f"{row.first_s:.1f}")
        cells.append((row.name, peak, *times, f"{row.differs:.1g}"))
    head = ["option", "peak, GB", "picture, s", "of four at once, s", "first picture, s", "differs"]
    lines += reports.table(head, cells)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="small models and pictures, to try the script")
    parser.add_argument("--out", type=Path, help="writes FILE.json and FILE.md, after each row")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    bench = Bench(device, TINY if args.tiny else REAL, 2 if args.tiny else args.steps, 64 if args.tiny else 1024)
    sizes = {n: sum(p.nbytes for p in bench.pipeline.components[n].parameters()) / 1e9 for n in ROLES}
    report = {
        "command": reports.command(),
        **reports.where(args.device),
        "served_difference": served_difference(args.device),
        "weights": ", ".join(f"{name} {size:.1f} GB" for name, size in sizes.items()),
    }

    def write() -> None:
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            rows = [msgspec.to_builtins(row) for row in bench.rows]
            reports.write(args.out, report | {"rows": rows}, table(report, bench.rows))

    everything = MemoryConfig(text_encoder_cpu_offload=True, dit_cpu_offload=True, vae_cpu_offload=True)
    runs: list[Callable[[], None]] = [
        lambda: bench.engine("all on the GPU", MemoryConfig()),
        lambda: bench.engine("`--text-encoder-cpu-offload`", MemoryConfig(text_encoder_cpu_offload=True)),
        lambda: bench.engine("`--dit-cpu-offload`", MemoryConfig(dit_cpu_offload=True)),
        lambda: bench.engine("text encoder, denoiser and VAE", everything),
        lambda: bench.engine(
            "the same, `--pin-cpu-memory false`", msgspec.structs.replace(everything, pin_cpu_memory=False)
        ),
        lambda: bench.plain("plain diffusers, `enable_model_cpu_offload`"),
        lambda: bench.engine("`--enable-torch-compile`", MemoryConfig(), compiles=True),
        # Last: its hooks stay.
        lambda: bench.engine("`--dit-layerwise-offload`", MemoryConfig(dit_layerwise_offload=True)),
    ]
    for run in runs:
        run()
        write()
    print(table(report, bench.rows))


if __name__ == "__main__":
    main()
