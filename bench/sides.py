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
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
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
from budget import Budget
from lines import fits, keep, say, say_logs
from numpy.typing import NDArray
from plain import plain_rows
from real_models import MODELS
from rows import NUM_STAGGERED, ROWS, STAGGER_S, Measured, Row, tiny
from served import CACHES, Server, picture, ready_s, serving
from settling import Known, Settling, known_of, unsettled

EARLY = ("all", "first", "none")
SIDES = ("eager", "compiled", "max-autotune", "sgld", "http")
# Where the prompts and seeds of requests begin that others aren't compared with; those of a later turn are others, as
# what text encoders said is kept.
_LATER, _STAGGERED = 40, 100


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


def early_rows(rows: Sequence[Row], which: str) -> Sequence[Row]:
    """Those that are measured before things are compiled."""
    return {"all": rows, "first": rows[:1], "none": []}[which]


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
