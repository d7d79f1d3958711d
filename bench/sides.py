"""One side of bench/compare.py, in a process of its own: measures rows of one model one way, a JSON line for each.

The sides: `eager` and `compiled` are plain diffusers, the latter by its documented recipe of regional compilation
(`compile_repeated_blocks(fullgraph=True)`); `max-autotune` is diffusers' recipe of whole compilation
(`torch.compile(mode="max-autotune", fullgraph=True)` in the channels-last format); `sgld` is an Engine with its rank
process; `http` is `sgld serve` and a client. It begins when it reads a line on stdin: the seconds that it has, or
nothing. What is worth most comes first, and each row is said as soon as it is known: `sgld-early` is sgld before
anything is compiled. What is measured while code is still on its way says so.
"""

import argparse
import functools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from stuck import show_stacks  # before what takes long to import: a rank imports this script, too

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a rank chooses that itself, unless torch is there before it

import anyio
import httpx2
import msgspec
import numpy as np
import torch
from budget import Budget
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from real_models import MODELS
from roofline import ROOF_SIDE, moment, roof_tflops, step_tflop
from rows import NUM_STAGGERED, ROWS, STAGGER_S, Measured, Row, tiny
from served import CACHES, Server, picture, ready_s, serving

EARLY = ("all", "first", "none")
SIDES = ("eager", "compiled", "max-autotune", "sgld", "http")
# Of the staggered requests a plain pipeline runs so many, which have as many steps in the mean as all.
_SOME_STAGGERED = (0, 5, 10, 15)
# Where the prompts and seeds of requests begin that others aren't compared with; those of a later turn are others, as
# what text encoders said is kept.
_LATER, _STAGGERED, _SETTLING = 40, 100, 500
_FEW_STEPS = {"num_inference_steps": 6}
_LOOK_S = 0.2
# Rounds that took as long as one another, within so much.
_NUM_STEADY, _STEADY = 3, 1.1


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


def plain_rows(rows: Sequence[Row], args: argparse.Namespace, budget: Budget) -> Iterator[Measured]:
    """Measure with plain diffusers, one request after the other."""
    torch.set_grad_enabled(False)
    plain = Plain(args.model, args.folder, args.device, args.side)
    call = MODELS[args.model].call
    notes: dict[str, Any] = {"load_s": plain.load_s}
    launch_us = plain.launch_us()
    if args.side == "eager":
        notes["roof_tflops"] = roof_tflops(args.device, 256 if args.tiny else ROOF_SIDE)
    for row in rows:
        if not fits(row, budget):
            continue
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
        for index in budget.as_many(range(1, args.repeats + 1)):
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

    async def known(self) -> "Known":
        """What the engine says of its components and their code by now."""
        return known_of(self._engine.model.decisions, msgspec.to_builtins(self._engine.statistics().replicas))

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


async def our_rows(rows: Sequence[Row], args: argparse.Namespace, budget: Budget) -> None:
    """Measure with the engine: all rows as they are at first, then requests for a while, then all rows again."""
    from sgld.engine.engine import Engine

    say_logs()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        start = time.perf_counter()
        async with Engine(msgspec.structs.replace(engine_config(args), trace=str(trace))) as engine:
            with anyio.move_on_after(args.ready_s):
                await engine.ready()
            if engine.model is None:
                show_stacks(os.getpid())
                raise SystemExit(f"the engine isn't ready after {args.ready_s:g} s; what its processes do is above")
            load_s = time.perf_counter() - start
            ours = OurRows(Ours(engine), rows, args, budget, load_s)
            await ours.measure()
        ticks = [event for event in json.loads(trace.read_text()) if "cost_key" in event.get("args", {})]
    for name, ids in ours.ids.items():
        say("ticks", {"row": name, **busy(ticks, ids, MODELS[args.model].denoiser)})


class OurRows:
    """The rows, measured with the engine.

    :ivar ids: of requests that were measured last, by row.
    """

    def __init__(
        self, ours: Ours, rows: Sequence[Row], args: argparse.Namespace, budget: Budget, load_s: float
    ) -> None:
        self.ids: dict[str, list[str]] = {}
        self._ours, self._rows, self._args, self._budget = ours, rows, args, budget
        self._call = MODELS[args.model].call
        self._notes: dict[str, Any] = {"load_s": load_s}
        self._first_s: dict[str, float] = {}
        self._measured: dict[str, Measured] = {}
        self._is_settled = True

    async def measure(self) -> None:
        """Measure; what fits into the budget."""
        say("decisions", (await self._ours.known()).decisions)
        start, early = time.perf_counter(), early_rows(self._rows, self._args.early)
        for row in self._rows:
            if row in early:
                await self._row(row, "sgld-early")
            elif row.kind == "single":
                await self._first(row)
        once_s = time.perf_counter() - start
        singles = [row for row in self._rows if row.kind == "single"]
        if singles:
            self._is_settled = await self._settling(self._budget.left_s - once_s).singles()
        for row in singles:
            await self._row(row, "sgld")
        # Then, as what these call for is compiled beside others.
        for row in self._rows:
            if row.kind == "staggered":
                together = functools.partial(self._ours.staggered, row, self._call)
                # A turn takes long; one is to be measured.
                self._is_settled = await self._settling(0.6 * self._budget.left_s).staggered(together)
                await self._row(row, "sgld")
        say("decisions", (await self._ours.known()).decisions)
        for row in singles:
            if fits(row, self._budget):
                await self._pictures(row)

    def _settling(self, limit_s: float) -> "Settling":
        """It takes so many seconds at most."""

        async def one(request: dict[str, Any]) -> float:
            return (await self._ours.run(request))[1]

        return Settling(self._rows, self._call, min(self._args.settle_s, limit_s), one, self._ours.known)

    async def _row(self, row: Row, side: str) -> None:
        if not fits(row, self._budget):
            return
        measured = Measured(row.name, side, notes=dict(self._notes))
        if row.kind == "single":
            measured.first_s = await self._first(row)
        before = await self._ours.known()
        if row.kind == "staggered":
            await self._staggered(row, measured)
        else:
            await self._singles(row, measured)
        measured.notes |= unsettled(before, await self._ours.known(), is_settled=self._is_settled)
        self._measured[row.name] = measured
        say("measured", asdict(measured))

    async def _first(self, row: Row) -> float:
        """Seconds of the first request of a row, which is sent once."""
        if row.name not in self._first_s:
            self._first_s[row.name], _, frames = await self._ours.run(row.request(0, self._call))
            keep(self._args, row, "sgld-first", frames)
        return self._first_s[row.name]

    async def _staggered(self, row: Row, measured: Measured) -> None:
        begin = _STAGGERED + _LATER * 2 * (measured.side == "sgld")
        turns = self._budget.as_many(range(3))
        taken = [await self._ours.staggered(row, self._call, begin + NUM_STAGGERED * turn) for turn in turns]
        measured.first_s, measured.warm_s = taken[0], taken[1:] or taken

    async def _singles(self, row: Row, measured: Measured) -> None:
        begin, ids = 1 + _LATER * (measured.side == "sgld"), []
        for index in self._budget.as_many(range(begin, begin + self._args.repeats)):
            elapsed_s, step_ms, _ = await self._ours.run(row.request(index, self._call))
            measured.warm_s.append(elapsed_s)
            measured.step_ms.append(step_ms)
            ids.append(self._ours.last_id)
        self.ids[row.name] = ids

    async def _pictures(self, row: Row) -> None:
        """What it draws now, and what an exact request draws and takes."""
        keep(self._args, row, "sgld", (await self._ours.run(row.request(0, self._call)))[2])
        exact_s, _, frames = await self._ours.run(row.request(0, self._call) | {"exact": True})
        keep(self._args, row, "sgld-exact", frames)
        if (measured := self._measured.get(row.name)) is not None:
            measured.notes["exact_s"] = exact_s
            say("measured", asdict(measured))


def fits(row: Row, budget: Budget) -> bool:
    """Whether there is time for a row; says so where there is none."""
    if budget.has(0):
        return True
    say("skipped", row.name)
    return False


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


@dataclass(frozen=True)
class Known:
    """What is said of components, by name, and of their code: whether some is on its way, how often that changed."""

    decisions: dict[str, str]
    is_compiling: bool = False
    num_changes: int = 0


def known_of(decisions: Mapping[str, str], replicas: Sequence[Mapping[str, Any]]) -> Known:
    """Of what the engine says of its model, and the statistics of its replicas."""
    is_compiling = any(replica["is_compiling"] for replica in replicas)
    return Known(dict(decisions), is_compiling, sum(replica["num_code_changes"] for replica in replicas))


def unsettled(before: Known, after: Known, *, is_settled: bool) -> dict[str, str]:
    """A note for what was measured meanwhile, where it isn't what is measured once all is compiled."""
    if has_come(before, after):
        return {"unsettled": "code was being compiled"}
    return {} if is_settled else {"unsettled": "times weren't steady before"}


def early_rows(rows: Sequence[Row], which: str) -> Sequence[Row]:
    """Those that are measured before things are compiled."""
    return {"all": rows, "first": rows[:1], "none": []}[which]


class Settling:
    """Requests that aren't measured, while things are compiled and captured in the background.

    :param limit_s: after so many seconds it ends in any case.
    :param one: runs a request; :return: what it took, in any unit.
    :param known: what is said of components and their code.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        call: Any,
        limit_s: float,
        one: Callable[[dict[str, Any]], Awaitable[float]],
        known: Callable[[], Awaitable[Known]],
    ) -> None:
        self._until = time.perf_counter() + limit_s
        self._rows, self._call, self._one, self._known = rows, call, one, known
        self._indices = count(_SETTLING)

    async def singles(self) -> bool:
        """Until the last rounds took as long as one another, and all is compiled; whether that was so in time."""
        rounds: list[list[float]] = []
        while (before := await self._idled()) is not None:
            rounds.append([await self._short(row) for row in self._rows if row.kind != "staggered"])
            say("settling", {"took": [round(value, 3) for value in rounds[-1]]})
            if is_steady(rounds) and is_done(before, await self._known()):
                return True
        return False

    async def staggered(self, together: Callable[[int], Awaitable[Any]]) -> bool:
        """Until all is compiled that staggered requests call for; whether that was so in time.

        :param together: runs these, the first of which has this index.
        """
        for turn in count(2):
            if (before := await self._idled()) is None:
                return False
            start = time.perf_counter()
            await together(_SETTLING * turn)
            say("settling", {"staggered_s": round(time.perf_counter() - start, 3)})
            if is_done(before, await self._known()):
                return True
        raise AssertionError("turns are endless")

    async def _idled(self) -> Known | None:
        """What is known once no code is on its way; None: time is up.

        Nothing is sent meanwhile, as a rank without requests reads code at once.
        """
        start = time.perf_counter()
        while time.perf_counter() < self._until:
            known = await self._known()
            if not known.is_compiling:
                if (idle_s := time.perf_counter() - start) > _LOOK_S:
                    say("settling", {"idle_s": round(idle_s, 3)})
                return known
            await anyio.sleep(_LOOK_S)
        return None

    async def _short(self, row: Row) -> float:
        return await self._one(row.request(next(self._indices), self._call) | _FEW_STEPS)


def is_done(before: Known, after: Known) -> bool:
    """Whether all that is to be compiled is, and was meanwhile."""
    return not has_come(before, after) and is_compiled(after.decisions)


def has_come(before: Known, after: Known) -> bool:
    """Whether code was on its way meanwhile, or is."""
    return before.is_compiling or after.is_compiling or before.num_changes != after.num_changes


def is_steady(rounds: Sequence[Sequence[float]]) -> bool:
    """Whether the last three rounds differ by little."""
    last = rounds[-_NUM_STEADY:]
    return len(last) == _NUM_STEADY and all(max(of) <= _STEADY * min(of) for of in zip(*last, strict=True))


def is_compiled(decisions: dict[str, str]) -> bool:
    """Whether all that is to be compiled is, or can't be."""
    said = [note.split("; ") for note in decisions.values() if "compiled by a process of its own" in note]
    return all("compiled" in phrases or any("without compilation" in p for p in phrases) for phrases in said)


async def http_rows(rows: Sequence[Row], args: argparse.Namespace, budget: Budget, *, is_warm: bool) -> None:
    """Measure over HTTP: all rows, then the first answer of another start.

    :param is_warm: there are caches; then the second start has none, else those of the first.
    """
    with tempfile.TemporaryDirectory() as folder:
        async with serving(Path(folder) / "first", _serve_flags(args)) as server, server.client() as http:
            ready, answered = await first_answers(server, http, rows, args, "warm" if is_warm else "cold")
            await _measure_http(http, rows, args, budget, dict(zip(rows, answered, strict=True)), ready)
            say("decisions", (await http.get("/server_info")).json()["model"]["decisions"])
        if not budget.has(1.2 * ready):
            say("skipped", "a second start")
            return
        caches = {name: str(Path(folder) / name) for name in CACHES} if is_warm else None
        async with serving(Path(folder) / "second", _serve_flags(args), caches) as server, server.client() as http:
            await first_answers(server, http, rows[:1], args, "cold" if is_warm else "warm")


async def first_answers(
    server: Server, http: httpx2.AsyncClient, rows: Sequence[Row], args: argparse.Namespace, cache: str
) -> tuple[float, list[float]]:
    """Seconds until the model is loaded, and what a first request of each row takes then."""
    ready, answered = await ready_s(server, http, args.ready_s), []
    for row in rows:
        begin = time.monotonic()
        await picture(http, row.request(0, MODELS[args.model].call))
        answered.append(time.monotonic() - begin)
    named = {"model": args.model, "cache": cache, "rows": [row.name for row in rows]}
    say("start", {**named, "ready_s": ready, "first_answers_s": answered})
    return ready, answered


async def _measure_http(
    http: httpx2.AsyncClient,
    rows: Sequence[Row],
    args: argparse.Namespace,
    budget: Budget,
    first_s: dict[Row, float],
    load_s: float,
) -> None:
    call = MODELS[args.model].call

    async def one(request: dict[str, Any]) -> float:
        begin = time.perf_counter()
        await picture(http, request)
        return time.perf_counter() - begin

    async def known() -> Known:
        said = (await http.get("/server_info")).json()
        return known_of(said["model"]["decisions"], said["replicas"])

    is_settled = True
    for side, measured_rows in (("http-early", early_rows(rows, args.early)), ("http", rows)):
        start = time.perf_counter()
        for row in measured_rows:
            if fits(row, budget):
                before = await known()
                measured = Measured(row.name, side, first_s[row], notes={"load_s": load_s})
                begin = 1 + _LATER * (side == "http")
                indices = budget.as_many(range(begin, begin + args.repeats))
                measured.warm_s = [await one(row.request(index, call)) for index in indices]
                measured.notes |= unsettled(before, await known(), is_settled=is_settled)
                say("measured", asdict(measured))
        if side == "http-early":
            limit_s = min(args.settle_s, budget.left_s - (time.perf_counter() - start))
            is_settled = await Settling(rows, call, limit_s, one, known).singles()


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


class _Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say("log", record.getMessage())


def say_logs() -> None:
    """The engine's log goes to the process that compares: how far a rank that loads is, and what is compiled."""
    logger = logging.getLogger("sgld")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Said())


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
    parser.add_argument("--early", default="all", choices=EARLY, help="rows measured before things are compiled, too")
    parser.add_argument("--settle-s", type=float, default=0.0)
    parser.add_argument("--ready-s", type=float, default=120.0, help="seconds until sgld must be ready")
    parser.add_argument("--options", default="{}", help="JSON: options of sgld")
    parser.add_argument("--tiny", action="store_true", help="small pictures and few steps")
    args = parser.parse_args()
    # All is imported; what takes the device begins when it is free.
    seconds = sys.stdin.readline().strip()
    budget = Budget(float(seconds) if seconds else None)
    rows = [tiny(ROWS[name]) if args.tiny else ROWS[name] for name in args.rows]
    if args.side == "sgld":
        anyio.run(our_rows, rows, args, budget)
    elif args.side == "http":
        is_warm = Path(os.environ[CACHES[0]]).exists()
        anyio.run(functools.partial(http_rows, rows, args, budget, is_warm=is_warm))
    else:
        for measured in plain_rows(rows, args, budget):
            say("measured", asdict(measured))


if __name__ == "__main__":
    main()
