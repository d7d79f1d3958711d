"""What does the engine add to a bare pipeline, per denoising step and per picture?

The same model, sizes and seeds run as plain `pipeline(...)` in this process and through an engine whose rank is a
process of its own, in turns; and that in several fresh processes, as the same loop takes 40 to 60 ms in different ones.
A step is the time from one forward of the denoiser to the next on the device's clock, by a hook here and by the trace
there; the lower quartile of all of them counts, as noise only ever adds time. Further models have as many layers as
make a step take about `--step-ms`: small ones, whose launches take all the time on a GPU, and large ones. What is
lost of the device is the part of a request's denoising in which no forward ran. CPU time, that of the front and the
rank together, is what holds on a machine that others use, too. Graphs are off, so that forwards are the same in both;
with `--graphs` the engine runs as users have it, and small steps become shorter than `--step-ms`. The report is written
after each model of each process; with `--seconds` processes that no longer fit are left out.

    python bench/overhead.py --repeats 5 [--device cuda --processes 3] [--out bench/results/overhead_cpu]
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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
from budget import Budget
from diffusers import DiffusionPipeline

from sgld.config import EngineConfig, GraphConfig, MemoryConfig
from sgld.engine.engine import Engine
from sgld.events import Completed
from sgld.models.resolve import EMBEDDED
from sgld.sampling_params import SamplingParams
from sgld.testing import InlineReplica
from sgld.worker.clock import Span, device_clock

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
    lost: float
    """The share of denoising in the engine in which no forward ran."""

    @property
    def added_step_ms(self) -> float:
        return self.engine_step_ms - self.bare_step_ms

    @property
    def added_outside_ms(self) -> float:
        """Without what noise does to the forwards themselves."""
        return self.added_step_ms - (self.engine_forward_ms - self.bare_forward_ms)

    @property
    def added(self) -> float:
        """The share of a bare step that the engine adds."""
        return self.added_step_ms / self.bare_step_ms


class Result(msgspec.Struct, frozen=True):
    """One process: a row for each model."""

    rows: list[Row]


def medians(results: list[Result]) -> list[Row]:
    """Of each model and number."""
    columns = [[result.rows[index] for result in results] for index in range(len(results[0].rows))]
    names = [name for name in Row.__struct_fields__ if name != "name"]
    return [
        Row(name=rows[0].name, **{name: statistics.median(getattr(row, name) for row in rows) for name in names})
        for rows in columns
    ]


def spread(results: list[Result], index: int, value: str, factor: float = 1.0) -> str:
    """From the least to the most over processes."""
    numbers = sorted(factor * getattr(result.rows[index], value) for result in results)
    return f"{numbers[0]:.1f} to {numbers[-1]:.1f}"


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
        self._device = device
        self._clock = device_clock(device)
        self._forwards: list[Span] = []
        self._case = case
        self._watch()

    def replace_denoiser(self, config: dict[str, Any]) -> None:
        """Another one, of the same class, made on the device: that of a GPU has billions of weights."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(_dtype(self._device))
        try:
            with torch.device(self._device):
                made = type(self.pipeline.transformer).from_config(config)
        finally:
            torch.set_default_dtype(before)
        self.pipeline.transformer = made.to(self._device, _dtype(self._device)).eval()
        self._watch()

    def _watch(self) -> None:
        denoiser = self.pipeline.transformer
        denoiser.register_forward_pre_hook(lambda *_: self._forwards.append(self._clock.begin()))
        denoiser.register_forward_hook(lambda *_: self._forwards[-1].end())

    @property
    def spans(self) -> Spans:
        """The forwards of the last picture, on the device."""
        return [(forward.started_ns / 1e6, 1e3 * forward.elapsed_s) for forward in self._forwards]

    def run(self, num_steps: int) -> float:
        """Milliseconds of a picture, to pixels on the host."""
        self._forwards.clear()
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
        model_path=case.model_path,
        device=args.device,
        num_cpu_threads=args.threads,
        trace=str(trace),
        # The same forwards in both.
        graphs=GraphConfig() if args.graphs else GraphConfig(graph_memory=0),
        memory=MemoryConfig(performance_mode="manual"),
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
            bare_runs.append(bare.spans)
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
        lost=statistics.median(lost_of(spans) for spans in engine_runs),
    )


def lost_of(spans: Spans) -> float:
    """The part of the time from the first forward to the last in which none ran."""
    (first_ms, _), (last_ms, length_ms) = spans[0], spans[-1]
    return 1 - sum(length for _, length in spans) / (last_ms + length_ms - first_ms)


def heavier(folder: Path, case: Case, device: str, step_ms: float, **width: int) -> Case:
    """A copy of a model with so many layers that a step takes about `step_ms`, with random weights.

    :param width: of its layers.
    """
    bare = Bare(case, device)
    config = {**bare.pipeline.transformer.config, **width}
    for _ in range(2):
        torch.manual_seed(0)
        bare.replace_denoiser(config)
        bare.run(4)
        bare.run(12)
        config["num_layers"] = max(1, round(config["num_layers"] * step_ms / quartile(steps_of([bare.spans]))))
    bare.replace_denoiser(config)
    bare.pipeline.save_pretrained(folder)
    (folder / "sgld_defaults.json").write_text((EMBEDDED["sgld/tiny-image"] / "sgld_defaults.json").read_text())
    size = f", {config['num_attention_heads'] * config['attention_head_dim']} wide" if width else ""
    return Case(name=f"{config['num_layers']} layers{size}, {case.size}", model_path=str(folder), size=case.size)


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def table(results: list[Result], report: dict[str, Any]) -> str:
    """The report for people."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        "# What does the engine add to a bare pipeline?",
        "",
        f"`{report['command']}`",
        "",
        f"{report['machine']}; {versions}. Load of the machine: {report['load']}. Milliseconds; steps are lower"
        " quartiles, pictures the fastest; of several processes the median, and from the least to the most.",
        "",
        f"A tick whose forward takes no time adds {report['tick_cpu_ms']:.2f} ms of CPU time, front and rank together.",
    ]
    if not results or not results[0].rows:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "| model and size | step, bare | its forward | step, engine | added | of a step "
        "| lost of the device | picture, bare | picture, engine | CPU time added per step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for index, row in enumerate(medians(results)):
        added = f"{100 * row.added:.1f} % ({spread(results, index, 'added', 100)})"
        lost = f"{100 * row.lost:.1f} % ({spread(results, index, 'lost', 100)})"
        lines.append(
            f"| {row.name} | {row.bare_step_ms:.2f} | {row.bare_forward_ms:.2f} | {row.engine_step_ms:.2f} "
            f"| {row.added_step_ms:.2f} | {added} | {lost} | {row.bare_picture_ms:.0f} | {row.engine_picture_ms:.0f} "
            f"| {row.added_cpu_ms:.2f} |"
        )
    return "\n".join(lines) + "\n"


def cases_of(args: argparse.Namespace, folder: Path) -> list[Case]:
    """The models: a wide one on a GPU, a deep one, and the small one."""
    if not args.sizes:
        return []
    model_path, cases = str(EMBEDDED["sgld/tiny-image"]), []
    small = Case(name="", model_path=model_path, size=max(args.sizes))
    if "wide" in args.models and args.device == "cuda":
        width = {"num_attention_heads": 16, "attention_head_dim": 128, "cross_attention_dim": 2048}
        cases.append(heavier(folder / "wide", small, args.device, args.step_ms, num_layers=8, **width))
    if "deep" in args.models:
        cases.append(heavier(folder / "deep", small, args.device, args.step_ms))
    if "small" in args.models:
        cases += [Case(name=f"tiny-image, {size}", model_path=model_path, size=size) for size in args.sizes]
    return cases


def in_fresh_processes(
    args: argparse.Namespace, cases: list[Case], folder: Path, budget: Budget, known: Callable[[list[Result]], None]
) -> None:
    """Each measures all cases.

    :param known: told what is measured, whenever it is more.
    """
    results: list[Result] = []
    given, out = folder / "cases.json", folder / "result.json"
    for _ in budget.as_many(range(args.processes)):
        results.append(Result([]))
        for case in cases:
            given.write_bytes(msgspec.json.encode([case]))
            command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--measure", str(given), str(out)]
            subprocess.run(command, check=True)
            results[-1].rows.extend(msgspec.json.decode(out.read_bytes(), type=Result).rows)
            print(results[-1].rows[-1], flush=True)
            known([each for each in results if len(each.rows) == len(cases)] or [results[0]])


def measure(args: argparse.Namespace) -> None:
    """In such a process."""
    given, out = args.measure
    cases = msgspec.json.decode(Path(given).read_bytes(), type=list[Case])
    rows = [anyio.run(measured, case, args, Path(given).parent / "trace.json") for case in cases]
    Path(out).write_bytes(msgspec.json.encode(Result(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a forward, in both")
    parser.add_argument("--step-ms", type=float, default=40.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[64, 128], help="sizes of pictures of the small model; none: ticks only"
    )
    parser.add_argument("--models", nargs="*", choices=["wide", "deep", "small"], default=["wide", "deep", "small"])
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs in the engine, as users have them")
    parser.add_argument("--seconds", type=float, help="processes that no longer fit are left out")
    parser.add_argument("--folder", type=Path, help="where models are made; by default that of temporary files")
    parser.add_argument("--out", type=Path, help="writes FILE.json and FILE.md")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    if args.measure:
        measure(args)
        return
    budget = Budget(args.seconds)
    load_before = os.getloadavg()[0]
    report: dict[str, Any] = {
        "command": reports.command(),
        **reports.where(args.device),
        "tick_cpu_ms": round(anyio.run(tick_cpu_ms, args.device), 3),
    }

    def known(results: list[Result]) -> None:
        report["load"] = f"{load_before:.1f} before, {os.getloadavg()[0]:.1f} after"
        report["processes"] = [
            [{n: round(v, 4) if isinstance(v, float) else v for n, v in msgspec.to_builtins(r).items()} for r in x.rows]
            for x in results
        ]
        if args.out:
            reports.write(args.out, report, table(results, report))

    last: list[Result] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        cases = cases_of(args, Path(temporary))
        known(last)
        in_fresh_processes(args, cases, Path(temporary), budget, lambda results: known(keep(last, results)))
    print(table(last, report))


def keep(last: list[Result], results: list[Result]) -> list[Result]:
    """The results, which are the last ones now."""
    last[:] = results
    return last


if __name__ == "__main__":
    main()
