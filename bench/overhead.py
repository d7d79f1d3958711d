"""What does the engine add to a bare pipeline, per denoising step and per picture?

The same model, sizes and seeds run as plain `pipeline(...)` in this process and through an engine whose rank is a
process of its own, in turns. A step is the time from one forward of the denoiser to the next, by a hook here and by
the trace there; the lower quartile of all of them counts, as noise only ever adds time. A second model is the first one
with as many layers as make a step take about `--step-ms`. CPU time, that of the front and the rank together, is what
holds on a machine that others use, too.

    python bench/overhead.py --repeats 5 [--device cuda] [--out bench/results/overhead_cpu]
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too
# As in a rank: threads of a forward that wait spinning would take the cores from the other process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TQDM_DISABLE", "1")

import anyio
import msgspec
import reports
import torch
from diffusers import DiffusionPipeline

from sgld.config import EngineConfig
from sgld.engine.engine import Engine
from sgld.events import Completed
from sgld.models.resolve import EMBEDDED
from sgld.sampling_params import SamplingParams
from sgld.testing import InlineReplica

PROMPT = "a red circle on the left of a blue square"


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A model and a size."""

    name: str
    model_path: str
    size: int


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of the bare pipeline and of the engine; a step is its forward and what is outside of it."""

    name: str
    bare_step_ms: float
    bare_forward_ms: float
    engine_step_ms: float
    engine_forward_ms: float
    bare_picture_ms: float
    engine_picture_ms: float
    added_cpu_ms: float
    """CPU time per step, everything that is done per picture included."""

    @property
    def added_step_ms(self) -> float:
        return self.engine_step_ms - self.bare_step_ms

    @property
    def added_outside_ms(self) -> float:
        """Without what noise does to the forwards themselves; on a GPU those of the bare pipeline end unseen."""
        return self.added_step_ms - (self.engine_forward_ms - self.bare_forward_ms)


class Halving(torch.nn.Module):
    """A denoiser that takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1,), 0.5))

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.weight * sample + 0 * timestep


class Stepping(DiffusionPipeline):  # type: ignore[misc]
    """A pipeline that does nothing but steps."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)

    @torch.no_grad()
    def __call__(self, prompt: str = "", num_inference_steps: int = 1, output_type: str = "pt") -> tuple[torch.Tensor]:
        sample = torch.ones(1, 3, 8, 8, device=self.transformer.device)
        with self.progress_bar(total=num_inference_steps) as bar:
            for _ in range(num_inference_steps):
                sample = self.transformer(sample, torch.ones(1, device=sample.device)).clamp(0, 1)
                bar.update()
        return (sample,)


async def tick_cpu_ms(device: str, num_steps: int = 2000) -> float:
    """CPU time that a tick of a single request adds, in the front and the rank, where the forward takes none."""
    pipeline = Stepping(Halving().to(device))
    pipeline.set_progress_bar_config(disable=True)
    params = SamplingParams(prompt=PROMPT, num_inference_steps=num_steps)
    config = EngineConfig(device=device, num_cpu_threads=1)  # type: ignore[arg-type]
    async with Engine(config, rank_factory=InlineReplica(pipeline)) as engine:
        await engine.ready()
        clocks = [1e3 * time.process_time()]
        pipeline(num_inference_steps=num_steps)
        clocks.append(1e3 * time.process_time())
        async for _ in engine.generate(params):
            pass
        clocks.append(1e3 * time.process_time())
    return (clocks[2] - 2 * clocks[1] + clocks[0]) / num_steps


Spans = list[tuple[float, float]]
"""Start and length of each forward, in milliseconds."""


class Bare:
    """The plain pipeline, with a clock at its denoiser."""

    def __init__(self, case: Case, device: str) -> None:
        self.pipeline = DiffusionPipeline.from_pretrained(case.model_path, dtype=_dtype(device)).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.spans: Spans = []
        denoiser = self.pipeline.transformer
        denoiser.register_forward_pre_hook(lambda *_: self.spans.append((1e3 * time.perf_counter(), 0.0)))
        denoiser.register_forward_hook(lambda *_: self._end())
        self._case = case

    def _end(self) -> None:
        start_ms, _ = self.spans.pop()
        self.spans.append((start_ms, 1e3 * time.perf_counter() - start_ms))

    def run(self, num_steps: int) -> float:
        """Milliseconds of a picture, to pixels on the host."""
        self.spans.clear()
        start = time.perf_counter()
        images = self.pipeline(
            PROMPT,
            height=self._case.size,
            width=self._case.size,
            num_inference_steps=num_steps,
            generator=torch.Generator().manual_seed(42),
            output_type="pt",
            **_recommended(),
        ).images
        (images.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        return 1e3 * (time.perf_counter() - start)


def _recommended() -> dict[str, Any]:
    """What the author of the model recommends, which the engine passes on by itself."""
    recommended = json.loads((EMBEDDED["sgld/tiny-image"] / "sgld_defaults.json").read_text())
    return {n: v for n, v in recommended.items() if n not in ("height", "width", "num_inference_steps", "fps")}


async def request_ms(engine: Engine, case: Case, num_steps: int) -> float:
    """Milliseconds of a request, to pixels in the front."""
    params = SamplingParams(prompt=PROMPT, height=case.size, width=case.size, num_inference_steps=num_steps)
    start = time.perf_counter()
    async for event in engine.generate(params):
        if isinstance(event, Completed):
            return 1e3 * (time.perf_counter() - start)
    raise AssertionError("the request didn't complete")


def spans_of(trace: Path) -> list[Spans]:
    """The forwards of the denoiser in a trace, by request."""
    requests: dict[str, Spans] = {}
    for event in json.loads(trace.read_text()):
        if event["name"] == "transformer.forward":
            requests.setdefault(event["args"]["requests"][0], []).append((event["ts"] / 1e3, event["dur"] / 1e3))
    return list(requests.values())


def cpu_ms() -> float:
    """CPU time of this process and of the rank so far, all their threads together."""
    ticks = 0
    for rank in multiprocessing.active_children():
        fields = Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return 1e3 * (time.process_time() + ticks / os.sysconf("SC_CLK_TCK"))


def quartile(values: list[float]) -> float:
    return sorted(values)[len(values) // 4]


def steps_of(runs: list[Spans]) -> list[float]:
    """From each forward to the next."""
    return [after - before for spans in runs for (before, _), (after, _) in pairwise(spans)]


async def measured(case: Case, args: argparse.Namespace, trace: Path) -> Row:
    """Run both in turns; the first round isn't counted."""
    bare = Bare(case, args.device)
    bare_runs: list[Spans] = []
    pictures: list[tuple[float, float]] = []
    cpu: list[float] = []
    config = EngineConfig(
        model_path=case.model_path, device=args.device, num_cpu_threads=args.threads, trace=str(trace)
    )
    async with Engine(config) as engine:
        await engine.ready()
        for _ in range(args.repeats + 1):
            clocks = [cpu_ms()]
            bare_ms = bare.run(args.steps)
            clocks.append(cpu_ms())
            pictures.append((bare_ms, await request_ms(engine, case, args.steps)))
            clocks.append(cpu_ms())
            cpu.append(clocks[2] - 2 * clocks[1] + clocks[0])
            bare_runs.append(list(bare.spans))
    engine_runs = spans_of(trace)[1:]
    lengths = [[length for spans in runs for _, length in spans] for runs in (bare_runs[1:], engine_runs)]
    return Row(
        name=case.name,
        bare_step_ms=quartile(steps_of(bare_runs[1:])),
        bare_forward_ms=quartile(lengths[0]),
        engine_step_ms=quartile(steps_of(engine_runs)),
        engine_forward_ms=quartile(lengths[1]),
        bare_picture_ms=min(ms for ms, _ in pictures[1:]),
        engine_picture_ms=min(ms for _, ms in pictures[1:]),
        added_cpu_ms=statistics.median(cpu[1:]) / args.steps,
    )


def heavier(folder: Path, case: Case, device: str, step_ms: float) -> Case:
    """A copy of a model with so many layers that a step takes about `step_ms`, with random weights."""
    bare = Bare(case, device)
    bare.run(8)
    bare.run(24)
    config = dict(bare.pipeline.transformer.config)
    config["num_layers"] = max(1, round(config["num_layers"] * step_ms / quartile(steps_of([bare.spans]))))
    torch.manual_seed(0)
    pipeline = bare.pipeline
    pipeline.transformer = type(pipeline.transformer).from_config(config)
    pipeline.to("cpu", torch.float32).save_pretrained(folder)
    (folder / "sgld_defaults.json").write_text((EMBEDDED["sgld/tiny-image"] / "sgld_defaults.json").read_text())
    return Case(name=f"{config['num_layers']} layers, {case.size}", model_path=str(folder), size=case.size)


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def table(rows: list[Row], report: dict[str, Any]) -> str:
    """The report for people."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        "# What does the engine add to a bare pipeline?",
        "",
        f"`{report['command']}`",
        "",
        f"{report['machine']}; {versions}. Load of the machine: {report['load']}. Milliseconds; steps are lower"
        " quartiles, pictures the fastest.",
        "",
        f"A tick whose forward takes no time adds {report['tick_cpu_ms']:.2f} ms of CPU time, front and rank together.",
    ]
    if not rows:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "| model and size | step, bare | step, engine | added | of a step | added outside the forward | of a step "
        "| picture, bare | picture, engine | CPU time added per step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        pictures = f"{row.bare_picture_ms:.0f} | {row.engine_picture_ms:.0f}"
        added = " | ".join(
            f"{ms:.2f} | {100 * ms / row.bare_step_ms:.1f} %" for ms in (row.added_step_ms, row.added_outside_ms)
        )
        lines.append(
            f"| {row.name} | {row.bare_step_ms:.2f} | {row.engine_step_ms:.2f} | {added} | {pictures} "
            f"| {row.added_cpu_ms:.2f} |"
        )
    lines += [
        "",
        "The forwards of both are the same work in processes of their own, and on a GPU plain loops of it took 40 to 60"
        " ms from one process to the next. So what is outside of them is known better than the sum; whether forwards"
        " are slower in the engine isn't settled by such a run.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a forward, in both")
    parser.add_argument("--step-ms", type=float, default=40.0)
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[64, 128], help="sizes of pictures of the small model; none: ticks only"
    )
    parser.add_argument("--out", type=Path, help="writes FILE.json and FILE.md")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    folder = str(EMBEDDED["sgld/tiny-image"])
    cases = [Case(name=f"tiny-image, {size}", model_path=folder, size=size) for size in args.sizes]
    load_before = os.getloadavg()[0]
    tick_ms = anyio.run(tick_cpu_ms, args.device)
    with tempfile.TemporaryDirectory() as temporary:
        small = Case(name="", model_path=folder, size=max(args.sizes, default=0))
        cases += [heavier(Path(temporary) / "model", small, args.device, args.step_ms)] if cases else []
        rows = [anyio.run(measured, case, args, Path(temporary) / "trace.json") for case in cases]
    report = {
        "command": f"python bench/overhead.py --repeats {args.repeats} --device {args.device} --threads {args.threads}"
        f" --sizes {' '.join(map(str, args.sizes))}".rstrip(),
        **reports.where(args.device),
        "load": f"{load_before:.1f} before, {os.getloadavg()[0]:.1f} after",
        "tick_cpu_ms": round(tick_ms, 3),
        "rows": [
            {n: round(v, 3) if isinstance(v, float) else v for n, v in msgspec.to_builtins(r).items()} for r in rows
        ],
    }
    print(table(rows, report))
    if args.out:
        reports.write(args.out, report, table(rows, report))


if __name__ == "__main__":
    main()
