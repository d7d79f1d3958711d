"""One side of bench/compare.py, in a process of its own: measures rows of one model one way, a JSON line for each.

The sides: `eager` and `compiled` are plain diffusers, the latter by its documented recipe of regional compilation
(`compile_repeated_blocks(fullgraph=True)`); `max-autotune` is diffusers' recipe of whole compilation
(`torch.compile(mode="max-autotune", fullgraph=True)` in the channels-last format); `sgld` is an Engine with its rank
process; `http` is `sgld serve` and a client. It begins when it reads a line on stdin.
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a rank chooses that itself, unless torch is there before it

import anyio
import httpx2
import msgspec
import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from real_models import MODELS
from roofline import ROOF_SIDE, moment, roof_tflops, step_tflop
from rows import NUM_STAGGERED, ROWS, STAGGER_S, Measured, Row, tiny
from served import CACHES, Server, picture, ready_s, serving

SIDES = ("eager", "compiled", "max-autotune", "sgld", "http")
# Of the staggered requests a plain pipeline runs so many, which have as many steps in the mean as all.
_SOME_STAGGERED = (0, 5, 10, 15)
# Where the prompts and seeds of requests begin that others aren't compared with.
_STAGGERED, _SETTLING = 100, 500
_FEW_STEPS = {"num_inference_steps": 10}
# Rounds that took as long as one another, within so much.
_NUM_STEADY, _STEADY = 3, 1.05


class Plain:
    """The pipeline as diffusers runs it."""

    def __init__(self, model: str, folder: Path, device: str, side: str) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self._device = device
        start = time.perf_counter()
        self.pipeline = DiffusionPipeline.from_pretrained(str(folder), dtype=dtype).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.load_s = time.perf_counter() - start
        self.denoiser = denoiser = getattr(self.pipeline, MODELS[model].denoiser)
        if side == "compiled":
            denoiser.compile_repeated_blocks(fullgraph=True)
        elif side == "max-autotune":
            denoiser.to(memory_format=torch.channels_last)
            denoiser.compile(mode="max-autotune", fullgraph=True)

    def run(self, request: dict[str, Any]) -> tuple[float, float, NDArray[np.uint8]]:
        """Seconds of a request, milliseconds of its steps, and its frames."""
        ends: list[Any] = []

        def note(_pipeline: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            ends.append(self._mark())
            return {}

        kwargs = {name: value for name, value in request.items() if name != "seed"}
        generator = torch.Generator().manual_seed(request["seed"])
        start = time.perf_counter()
        output = self.pipeline(**kwargs, generator=generator, callback_on_step_end=note)[0]
        self._wait()
        elapsed_s = time.perf_counter() - start
        between = self._between_ms(ends[0], ends[-1]) / (len(ends) - 1)
        return elapsed_s, between, _as_frames(output)

    def launch_us(self) -> float:
        """What one small operation costs to launch; the device is done with each sooner."""
        x = torch.ones(1, device=self._device)
        for _ in range(100):
            x.add_(1)
        self._wait()
        num, rounds = 500, []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(num):
                x.add_(1)
            rounds.append(1e6 * (time.perf_counter() - start) / num)
            self._wait()
        return statistics.median(rounds)

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _mark(self) -> Any:
        """A moment of the device; nobody waits for it."""
        if self._device != "cuda":
            return time.perf_counter()
        event = moment()
        event.record()
        return event

    def _between_ms(self, before: Any, after: Any) -> float:
        return float(before.elapsed_time(after) if self._device == "cuda" else 1e3 * (after - before))


def plain_rows(rows: Sequence[Row], args: argparse.Namespace) -> Iterator[Measured]:
    """Measure with plain diffusers, one request after the other."""
    torch.set_grad_enabled(False)
    plain = Plain(args.model, args.folder, args.device, args.side)
    call = MODELS[args.model].call
    notes: dict[str, Any] = {"load_s": plain.load_s}
    launch_us = plain.launch_us()
    if args.side == "eager":
        notes["roof_tflops"] = roof_tflops(args.device, 256 if args.tiny else ROOF_SIDE)
    for row in rows:
        measured = Measured(row.name, args.side, launch_us=launch_us, notes=dict(notes))
        if row.kind == "staggered":
            plain.run(row.request(0, call) | {"num_inference_steps": 2})
            some = [plain.run(row.request(index, call))[0] for index in _SOME_STAGGERED]
            measured.warm_s = [statistics.fmean(some)]
            measured.notes["num_measured"] = len(some)
            yield measured
            continue
        measured.first_s, _, frames = plain.run(row.request(0, call))
        keep(args, row, args.side, frames)
        for index in range(1, args.repeats + 1):
            elapsed_s, step_ms, _ = plain.run(row.request(index, call))
            measured.warm_s.append(elapsed_s)
            measured.step_ms.append(step_ms)
        if args.side == "eager":
            measured.notes["step_tflop"] = step_tflop(plain.pipeline, plain.denoiser, row.request(0, call))
        yield measured


class Ours:
    """The engine, with its rank in a process of its own."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.last_id = ""

    async def run(self, request: dict[str, Any]) -> tuple[float, float, NDArray[np.uint8]]:
        """Seconds of a request, milliseconds of its steps, and its frames."""
        from sgld.engine.requests import output_id
        from sgld.events import Completed, Failed, Progress
        from sgld.sampling_params import SamplingParams

        ends: list[float] = []
        start = time.perf_counter()
        async for event in self._engine.generate(SamplingParams(**request)):
            self.last_id = output_id(event.request_id, event.output_index)
            match event:
                case Progress():
                    ends.append(time.perf_counter())
                case Failed(message=message):
                    raise RuntimeError(message)
                case Completed(frames=frames):
                    elapsed_s = time.perf_counter() - start
                    between = 1e3 * (ends[-1] - ends[0]) / max(len(ends) - 1, 1)
                    return elapsed_s, between, frames
        raise RuntimeError("the request ended without a result")

    @property
    def decisions(self) -> str:
        """What the engine says of its components by now."""
        return json.dumps(self._engine.model.decisions)

    async def staggered(self, row: Row, call: Any, first: int) -> float:
        """Seconds of a request, from the first one's arrival to the last one's end; `first` is its index."""
        start = time.perf_counter()

        async def later(index: int) -> None:
            await anyio.sleep(index * STAGGER_S)
            await self.run(row.request(first + index, call))

        async with anyio.create_task_group() as group:
            for index in range(NUM_STAGGERED):
                group.start_soon(later, index)
        return (time.perf_counter() - start) / NUM_STAGGERED


async def our_rows(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Measure with the engine: first requests of all rows, then requests for a while, then each row."""
    from sgld.engine.engine import Engine

    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        start = time.perf_counter()
        async with Engine(msgspec.structs.replace(engine_config(args), trace=str(trace))) as engine:
            info = await engine.ready()
            load_s = time.perf_counter() - start
            say("decisions", info.decisions)
            measured_ids = await _measure(Ours(engine), rows, args, load_s)
        ticks = [event for event in json.loads(trace.read_text()) if "cost_key" in event.get("args", {})]
    for name, ids in measured_ids.items():
        say("ticks", {"row": name, **busy(ticks, ids, MODELS[args.model].denoiser)})


async def _measure(ours: Ours, rows: Sequence[Row], args: argparse.Namespace, load_s: float) -> dict[str, list[str]]:
    """:return: the ids of single requests that were measured, by row."""
    call = MODELS[args.model].call
    first_s: dict[str, float] = {}
    for row in rows:
        if row.kind == "single":
            first_s[row.name], _, frames = await ours.run(row.request(0, call))
            keep(args, row, "sgld-first", frames)

    async def one(request: dict[str, Any]) -> float:
        return (await ours.run(request))[1]

    async def said() -> str:
        return ours.decisions

    await Settling(rows, call, args.settle_s).run(one, said)
    ids: dict[str, list[str]] = {}
    for row in rows:
        measured = Measured(row.name, args.side, first_s.get(row.name), notes={"load_s": load_s})
        if row.kind == "staggered":
            measured.first_s, *measured.warm_s = [
                await ours.staggered(row, call, _STAGGERED * turn) for turn in range(1, 4)
            ]
            say("measured", asdict(measured))
            continue
        for index in range(1, args.repeats + 1):
            elapsed_s, step_ms, _ = await ours.run(row.request(index, call))
            measured.warm_s.append(elapsed_s)
            measured.step_ms.append(step_ms)
            ids.setdefault(row.name, []).append(ours.last_id)
        keep(args, row, "sgld", (await ours.run(row.request(0, call)))[2])
        measured.notes["exact_s"], _, frames = await ours.run(row.request(0, call) | {"exact": True})
        keep(args, row, "sgld-exact", frames)
        say("measured", asdict(measured))
    return ids


def busy(ticks: Sequence[dict[str, Any]], ids: Sequence[str], denoiser: str) -> dict[str, Any]:
    """Of a trace: what of the time between the denoiser's first forward and its last isn't in one, and how they ran.

    Of the median request; times are those of the device.
    """
    shares, ran = [], Counter[str]()
    for request_id in ids:
        own = [t for t in ticks if request_id in t["args"]["requests"] and t["args"]["cost_key"].startswith(denoiser)]
        span_us = max(t["ts"] + t["dur"] for t in own) - min(t["ts"] for t in own)
        shares.append(1 - sum(t["dur"] for t in own) / span_us)
        ran.update(t["args"].get("variant", "") for t in own)
    return {"lost": statistics.median(shares), "variants": dict(ran)}


class Settling:
    """Requests that aren't measured, while things are compiled and captured in the background.

    It ends when the last rounds took as long as one another and what is to be compiled is, or when its time is up.
    """

    def __init__(self, rows: Sequence[Row], call: Any, limit_s: float) -> None:
        self._rows = [row for row in rows if row.kind != "staggered"]
        self._call = call
        self._limit_s = limit_s

    async def run(self, one: Callable[[dict[str, Any]], Awaitable[float]], said: Callable[[], Awaitable[str]]) -> None:
        """Send them.

        :param one: runs a request; :return: what it took, in any unit.
        :param said: what the engine says of its components.
        """
        until, indices = time.perf_counter() + self._limit_s, count(_SETTLING)
        rounds: list[list[float]] = []
        while time.perf_counter() < until:
            requests = [row.request(next(indices), self._call) | _FEW_STEPS for row in self._rows]
            rounds.append([await one(request) for request in requests])
            say("settling", {"took": [round(value, 3) for value in rounds[-1]]})
            if is_steady(rounds) and "compiled" in await said():
                return


def is_steady(rounds: Sequence[Sequence[float]]) -> bool:
    """Whether the last three rounds differ by little."""
    last = rounds[-_NUM_STEADY:]
    return len(last) == _NUM_STEADY and all(max(of) <= _STEADY * min(of) for of in zip(*last, strict=True))


async def http_rows(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Measure over HTTP: the first answer on a cold cache, then all with a server that finds what the engine kept."""
    with tempfile.TemporaryDirectory() as folder:
        cold = {name: str(Path(folder) / name) for name in CACHES}
        async with serving(Path(folder) / "cold", _serve_flags(args), cold) as server, server.client() as http:
            await first_answers(server, http, rows[:1], args, "cold")
        async with serving(Path(folder) / "warm", _serve_flags(args)) as server, server.client() as http:
            ready, answered = await first_answers(server, http, rows, args, "warm")
            await _measure_http(http, rows, args, dict(zip(rows, answered, strict=True)), ready)
            say("decisions", (await http.get("/server_info")).json()["model"]["decisions"])


async def first_answers(
    server: Server, http: httpx2.AsyncClient, rows: Sequence[Row], args: argparse.Namespace, cache: str
) -> tuple[float, list[float]]:
    """Seconds until the model is loaded, and what a first request of each row takes then."""
    ready, answered = await ready_s(server, http), []
    for row in rows:
        begin = time.monotonic()
        await picture(http, row.request(0, MODELS[args.model].call))
        answered.append(time.monotonic() - begin)
    named = {"model": args.model, "cache": cache, "rows": [row.name for row in rows]}
    say("start", {**named, "ready_s": ready, "first_answers_s": answered})
    return ready, answered


async def _measure_http(
    http: httpx2.AsyncClient, rows: Sequence[Row], args: argparse.Namespace, first_s: dict[Row, float], load_s: float
) -> None:
    call = MODELS[args.model].call

    async def one(request: dict[str, Any]) -> float:
        begin = time.perf_counter()
        await picture(http, request)
        return time.perf_counter() - begin

    async def said() -> str:
        return json.dumps((await http.get("/server_info")).json()["model"]["decisions"])

    await Settling(rows, call, args.settle_s).run(one, said)
    for row in rows:
        measured = Measured(row.name, args.side, first_s[row], notes={"load_s": load_s})
        measured.warm_s = [await one(row.request(index, call)) for index in range(1, args.repeats + 1)]
        keep(args, row, "http", _as_frames([_decoded(await picture(http, row.request(0, call)))]))
        say("measured", asdict(measured))


def engine_config(args: argparse.Namespace) -> Any:
    """What `sgld serve` would make of the flags."""
    from sgld.config import EngineConfig
    from sgld_cli.settings import accept, fill, merge

    given = {"model_path": str(args.folder), "device": args.device, **json.loads(args.options)}
    values = {name: setting.value for name, setting in merge([accept(given, "flag")]).items()}
    return fill(EngineConfig, values)


def _serve_flags(args: argparse.Namespace) -> list[str]:
    """The same for `sgld serve`."""
    flags = ["--model-path", str(args.folder), "--device", args.device]
    for name, value in json.loads(args.options).items():
        flags += [f"--{name.replace('_', '-')}", str(value).lower() if isinstance(value, bool) else str(value)]
    return flags


def keep(args: argparse.Namespace, row: Row, name: str, frames: NDArray[np.uint8]) -> None:
    """Pictures of request 0, to be compared."""
    np.save(args.pictures / f"{row.name}.{name}.npy", frames)


def _as_frames(output: Any) -> NDArray[np.uint8]:
    """(F, H, W, 3), of pictures, or of one video as floats."""
    first = output[0]
    if isinstance(first, np.ndarray):
        return (255 * first).round().astype(np.uint8)
    return np.stack([np.asarray(picture) for picture in output])


def _decoded(content: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(content)).convert("RGB")


def say(kind: str, value: Any) -> None:
    """One line for the process that compares."""
    print(json.dumps({kind: value}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("folder", type=Path, help="the model")
    parser.add_argument("pictures", type=Path, help="folder for the first picture of each row")
    parser.add_argument("rows", nargs="+", choices=list(ROWS))
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--settle-s", type=float, default=0.0)
    parser.add_argument("--options", default="{}", help="JSON: options of sgld")
    parser.add_argument("--tiny", action="store_true", help="small pictures and few steps")
    args = parser.parse_args()
    # All is imported; what takes the device begins when it is free.
    sys.stdin.readline()
    rows = [tiny(ROWS[name]) if args.tiny else ROWS[name] for name in args.rows]
    if args.side == "sgld":
        anyio.run(our_rows, rows, args)
    elif args.side == "http":
        anyio.run(http_rows, rows, args)
    else:
        for measured in plain_rows(rows, args):
            say("measured", asdict(measured))


if __name__ == "__main__":
    main()
