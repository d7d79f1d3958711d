"""What does the engine add to a bare pipeline, per denoising step and per picture?

The same model, sizes and seeds run as plain `pipeline(...)` in one process and through an engine whose rank is a
process of its own, in turns; and that in several fresh processes. A step is the time from one forward of the denoiser
to the next on the device's clock, by a hook here and by the trace there; what is lost of the device is the part of a
request's denoising in which no forward ran. Beside the model that ships with sgld there are two whose forwards take
about `--step-ms`: `wide` is large enough for the device to need that long, as a CUDA graph of its forward tells, so the
host can be ahead of it; `deep` has small layers, whose launches take all the time on a GPU, so each thing that the host
does besides is seen. Graphs are off, so that forwards are the same in both; with `--graphs` a second engine has them.
Nothing is compiled. CPU time, that of the front and the rank together, is what holds on a machine that others use, too.
The report is written after each process; with `--seconds` rounds and processes that no longer fit are left out.

    python bench/overhead.py --repeats 5 [--device cuda --graphs --processes 3] [--out bench/results/overhead_cpu]
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
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
from added import Row, Way, text
from anyio import to_thread
from budget import Budget
from diffusers import DiffusionPipeline
from roofline import first_call, graph_of
from roofline import seconds as graph_s

from sgld.config import ConditioningConfig, EngineConfig, GraphConfig, MemoryConfig
from sgld.engine.engine import Engine
from sgld.events import Completed
from sgld.models.resolve import EMBEDDED
from sgld.sampling_params import SamplingParams
from sgld.testing import InlineReplica
from sgld.worker.clock import Span, device_clock

PROMPT = "a red circle on the left of a blue square"
SMALL = EMBEDDED["sgld/tiny-image"]
# What the model that ships with sgld draws; other sizes are scaled, which takes no steps.
SMALL_SIZE = 256
# Few layers: launching them takes a fraction of what they compute.
WIDE = {"num_attention_heads": 32, "attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 2}
# A device that is cooler, or another one, is faster than the one that chose the layers.
MARGIN = 1.1


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A model and a size; what its forward takes is that of `Row`."""

    name: str
    model_path: str
    size: int
    device_ms: float | None = None
    launch_ms: float | None = None


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

    def alone_ms(self) -> tuple[float | None, float | None]:
        """What a forward takes the device by itself, and the host to launch; None: the host is the device."""
        if self._device != "cuda":
            return None, None
        args, kwargs = first_call(self.pipeline, self.pipeline.transformer, self._request)
        # Without the clock, which can't be captured.
        forward = self.pipeline.transformer.forward
        launches = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            forward(*args, **kwargs)
            launches.append(1e3 * (time.perf_counter() - start))
            torch.cuda.synchronize()
        device_s = graph_s(graph_of(lambda: forward(*args, **kwargs)), self._device)
        return 1e3 * device_s, statistics.median(launches)

    @property
    def _request(self) -> dict[str, Any]:
        return {"prompt": PROMPT, "height": self._case.size, "width": self._case.size, **_recommended()}

    def _watch(self) -> None:
        denoiser = self.pipeline.transformer
        denoiser.register_forward_pre_hook(lambda *_: self._forwards.append(self._clock.begin()))
        denoiser.register_forward_hook(lambda *_: self._forwards[-1].end())

    @property
    def spans(self) -> Spans:
        """The forwards of the last picture, on the device."""
        return [(forward.started_ns / 1e6, 1e3 * forward.elapsed_s) for forward in self._forwards]

    def step_ms(self) -> float:
        """Of a step that isn't the first."""
        self.run(4)
        self.run(12)
        return way_of([self.spans], []).step_ms[0]

    def run(self, num_steps: int) -> float:
        """Milliseconds of a picture, to pixels on the host."""
        self._forwards.clear()
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(42)
        images = self.pipeline(
            **self._request, num_inference_steps=num_steps, generator=generator, output_type="pt"
        ).images
        (images.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        return 1e3 * (time.perf_counter() - start)


def _recommended() -> dict[str, Any]:
    """What the author of the model recommends, which the engine passes on by itself."""
    recommended = json.loads((SMALL / "sgld_defaults.json").read_text())
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


def way_of(runs: list[Spans], picture_ms: list[float]) -> Way:
    """The numbers of runs."""
    pairs = [list(pairwise(spans)) for spans in runs]
    return Way(
        step_ms=[statistics.median(after - before for (before, _), (after, _) in run) for run in pairs],
        forward_ms=[statistics.median(length for _, length in spans) for spans in runs],
        outside_ms=[statistics.median(after - start - length for (start, length), (after, _) in run) for run in pairs],
        lost=[lost_of(spans) for spans in runs],
        picture_ms=picture_ms,
    )


def lost_of(spans: Spans) -> float:
    """The part of the time from the first forward to the last in which none ran."""
    (first_ms, _), (last_ms, length_ms) = spans[0], spans[-1]
    return 1 - sum(length for _, length in spans) / (last_ms + length_ms - first_ms)


class Trial:
    """A case: the pipeline, and engines with and without graphs, run in turns."""

    def __init__(self, case: Case, args: argparse.Namespace, folder: Path) -> None:
        self._case, self._args = case, args
        self._engines: dict[str, Engine] = {}
        self._traces: dict[str, Path] = {}
        self._bare_runs: list[Spans] = []
        self._pictures: dict[str, list[float]] = {"bare": []}
        self._cpu: list[float] = []
        for index, way in enumerate(("engine", "graphs") if args.graphs else ("engine",)):
            trace = self._traces[way] = Path(tempfile.mkdtemp(dir=folder)) / "trace.json"
            config = EngineConfig(
                model_path=case.model_path,
                device=args.device,
                num_cpu_threads=args.threads,
                trace=str(trace),
                # The same forwards in both.
                graphs=GraphConfig() if index else GraphConfig(graph_memory=0),
                memory=MemoryConfig(performance_mode="manual"),
                # The plain pipeline encodes the same text each time, too.
                conditioning=ConditioningConfig(disable_conditioning_cache=True),
            )
            self._engines[way], self._pictures[way] = Engine(config), []

    async def open(self, stack: AsyncExitStack) -> None:
        """Start the engines, and load the pipeline while they load theirs."""
        for engine in self._engines.values():
            await stack.enter_async_context(engine)
        self._bare = await to_thread.run_sync(Bare, self._case, self._args.device)

    async def run(self, budget: Budget) -> None:
        """Run all ways in turns, as often as there is time for; the first round isn't counted."""
        for engine in self._engines.values():
            await engine.ready()
        await self._round()
        for _ in budget.as_many(range(self._args.repeats)):
            await self._round()

    async def _round(self) -> None:
        clocks = [cpu_ms()]
        self._pictures["bare"].append(self._bare.run(self._args.steps))
        clocks.append(cpu_ms())
        self._bare_runs.append(self._bare.spans)
        for way, engine in self._engines.items():
            self._pictures[way].append(await request_ms(engine, self._case, self._args.steps))
            clocks.append(cpu_ms())
        self._cpu.append((clocks[2] - 2 * clocks[1] + clocks[0]) / self._args.steps)

    def row(self) -> Row:
        """What was measured; once the engines are closed, as they write their traces then."""
        runs = {"bare": self._bare_runs, **{way: spans_of(trace) for way, trace in self._traces.items()}}
        ways = {way: way_of(runs[way][1:], self._pictures[way][1:]) for way in runs}
        case = self._case
        times = {"device_ms": case.device_ms, "launch_ms": case.launch_ms, "added_cpu_ms": self._cpu[1:]}
        return Row(name=case.name, **times, **ways)  # type: ignore[arg-type]


async def measured(cases: list[Case], args: argparse.Namespace, folder: Path, budget: Budget) -> list[Row]:
    """All models are loaded at the same time, and run one after the other."""
    trials = [Trial(case, args, folder) for case in cases]
    async with AsyncExitStack() as stack:
        for trial in trials:
            await trial.open(stack)
        for index, trial in enumerate(trials):
            await trial.run(Budget(budget.share(1, len(trials) - index)))
    return [trial.row() for trial in trials]


def made(folder: Path, args: argparse.Namespace, size: int, **config: Any) -> Case:
    """The small model with other layers, which have random weights: as many as make a forward take `--step-ms`.

    :param config: of its denoiser, where that is another one; then it is the device that is to need so long.
    """
    case = Case(name="", model_path=str(SMALL), size=size)
    bare = Bare(case, args.device)
    config = {**bare.pipeline.transformer.config, **config}
    is_wide = size != SMALL_SIZE
    for _ in range(2):
        torch.manual_seed(0)
        bare.replace_denoiser(config)
        step_ms = (bare.alone_ms()[0] if is_wide else None) or bare.step_ms()
        num = config["num_layers"] * args.step_ms / step_ms
        config["num_layers"] = max(1, math.ceil(MARGIN * num) if is_wide else round(num))
    bare.replace_denoiser(config)
    bare.pipeline.save_pretrained(folder)
    (folder / "sgld_defaults.json").write_text((SMALL / "sgld_defaults.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    device_ms, launch_ms = bare.alone_ms()
    name = f"{config['num_layers']} layers, {width} wide, {size}x{size}"
    return Case(name=name, model_path=str(folder), size=size, device_ms=device_ms, launch_ms=launch_ms)


def small(args: argparse.Namespace) -> Case:
    """The model that ships with sgld."""
    case = Case(name=f"tiny-image, {SMALL_SIZE}x{SMALL_SIZE}", model_path=str(SMALL), size=SMALL_SIZE)
    device_ms, launch_ms = Bare(case, args.device).alone_ms()
    return msgspec.structs.replace(case, device_ms=device_ms, launch_ms=launch_ms)


def cases_of(args: argparse.Namespace, folder: Path) -> list[Case]:
    """The models that are asked for."""
    cases = []
    if "wide" in args.models and args.device == "cuda":
        # Of the size that it is made for: others are scaled, and their positions are computed anew in each forward.
        cases.append(made(folder / "wide", args, args.size, sample_size=args.size // 8, **WIDE))
    if "deep" in args.models:
        cases.append(made(folder / "deep", args, SMALL_SIZE))
    if "small" in args.models:
        cases.append(small(args))
    return cases


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


class Measuring:
    """A fresh process that measures; it imports what it needs until it is told of the models."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--measure"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)

    def rows(self, cases: list[Case], folder: Path, seconds: float) -> list[Row]:
        """Wait for what it measures.

        :param seconds: that it has for rounds.

        :raises RuntimeError: it failed, and said why.
        """
        given, out = folder / "cases.json", folder / "rows.json"
        given.write_bytes(msgspec.json.encode(cases))
        self._process.communicate(f"{given}\n{out}\n{seconds}\n")
        if self._process.returncode:
            raise RuntimeError(f"the process that measures ended with code {self._process.returncode}")
        return msgspec.json.decode(out.read_bytes(), type=list[Row])


def measure(args: argparse.Namespace) -> None:
    """In such a process."""
    given, out = (Path(sys.stdin.readline().strip()) for _ in range(2))
    budget = Budget(float(sys.stdin.readline()))
    cases = msgspec.json.decode(given.read_bytes(), type=list[Case])
    out.write_bytes(msgspec.json.encode(anyio.run(measured, cases, args, given.parent, budget)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a forward, in both")
    parser.add_argument("--step-ms", type=float, default=40.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--models", nargs="*", choices=["wide", "deep", "small"], default=["wide", "deep", "small"])
    parser.add_argument("--size", type=int, default=1024, choices=[512, 1024, 2048], help="of pictures of the wide one")
    parser.add_argument("--graphs", action="store_true", help="an engine with CUDA graphs, too, as it is by default")
    parser.add_argument("--seconds", type=float, help="rounds and processes that no longer fit are left out")
    parser.add_argument("--folder", type=Path, help="where models are made; by default that of temporary files")
    parser.add_argument("--out", type=Path, help="writes FILE.json and FILE.md")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
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
    processes: list[list[Row]] = []

    def write() -> str:
        report["load"] = f"{load_before:.1f} before, {os.getloadavg()[0]:.1f} after"
        report["processes"] = [[rounded(msgspec.to_builtins(row)) for row in rows] for rows in processes]
        said = text(processes, report)
        if args.out:
            reports.write(args.out, report, said)
        return said

    write()
    if args.models:
        with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
            first = Measuring()
            cases = cases_of(args, Path(temporary))
            for index in budget.as_many(range(args.processes)):
                process = Measuring() if index else first
                processes.append(process.rows(cases, Path(temporary), budget.left_s))
                write()
    print(write())


def rounded(value: Any) -> Any:
    """The same with four digits."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
