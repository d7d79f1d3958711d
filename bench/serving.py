"""How does `sgld serve` do when requests come as they like? Open-loop Poisson traces over HTTP.

    python bench/serving.py --model-path FOLDER [--mix C] [--load 0.7] [--minutes 8] [--out bench/results/serving_c]
    python bench/serving.py --make flux ...        makes the model first (bench/real_models.py)
    python bench/serving.py --elastic 4 ...        on so many GPUs, which share forwards as it pays (`--elastic-sp`)
    python bench/serving.py --url http://...       asks a server that runs; then nothing is simulated
    python bench/serving.py --again REPORT.json --out ...      simulates what an earlier run measured, on any machine

What a request of each class takes alone is measured first, on a GPU of its own; so load 1 is what the server does
without merging, each GPU for itself. Arrivals don't wait for answers. "In time" is within 3 times what such a request
takes alone; goodput counts those. Then the same arrivals go through the simulation of bench/ranks.py, with the times of
forwards in the server's own trace (bench/ticks.py): at once, or later with `--no-simulation` and `--again`. The report
is written again and again while requests have their answers, with all that the simulation needs, and a run that is
ended early has those that were answered; with `--seconds` the trace is as long as there is time for.
"""

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import count, product
from pathlib import Path
from types import MappingProxyType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too
os.environ.setdefault("TQDM_DISABLE", "1")

import agreement
import httpx2
import measured
import msgspec
import policies
import reports
import ticks
from agreement import Asked, percentile
from budget import Budget
from policies import SLO_SCALE, Class
from real_models import MODELS, prompt
from served import image_body, ready_s, serving

from sgld.engine.curve import PATIENCE

HERE = Path(__file__).parent
RAM_DISK = "/dev/shm"
# So many requests alone, or fewer if they take longer than that together.
_NUM_ALONE, _ALONE_S = 3, 3.0
# To write the report, and to wait for the last answers; as many times the longest request.
_REST_S, _REST_FACTOR = 5.0, 2.0
# What each kind of request begins with: so many at once, with so many steps. So each of its forwards comes four times,
# and has been captured as a graph and compared with that. Two share forwards only where one like them was served.
_FEW_STEPS = ((1, 4), (2, 4), (1, 4))
# A number of ranks runs a call so often until it is replayed as a graph and its time is known.
_TRIES = PATIENCE + 2
# Prompts and seeds of requests that aren't part of the trace begin here: no text is encoded twice.
_ALONE, _WARM_UP = 700, 800
_POLL_S = 0.2
_KEEP_S = 20.0


@dataclass(frozen=True)
class Kind:
    """Requests of one kind, and their share of all."""

    name: str
    size: Mapping[str, int]
    num_steps: int
    share: float
    others: Mapping[str, Any] = field(default_factory=dict)
    """Further sampling params."""

    def request(self, index: int) -> dict[str, Any]:
        """Sampling params; each request has a prompt and a seed of its own."""
        return {
            "prompt": prompt(index),
            "seed": index,
            **self.size,
            "num_inference_steps": self.num_steps,
            **self.others,
        }


def _pictures(mix: Sequence[Class]) -> tuple[Kind, ...]:
    return tuple(Kind(of.name, {"height": of.side, "width": of.side}, of.num_steps, of.share) for of in mix)


def _clip(frames: int, height: int, width: int) -> dict[str, int]:
    return {"num_frames": frames, "height": height, "width": width}


PICTURES: Mapping[str, Sequence[Class]] = {**policies.MIXES, "small": policies.SMALL}


def mix_of(name: str, share: float, others: Mapping[str, Any] = MappingProxyType({})) -> tuple[Kind, ...]:
    """A mix by its name, whose requests have this share of their steps, and other params."""
    return tuple(replace(kind, num_steps=max(round(share * kind.num_steps), 2), others=others) for kind in MIXES[name])


MIXES = {
    **{name: _pictures(mix) for name, mix in PICTURES.items()},
    "video": (
        Kind("17x256x256", _clip(17, 256, 256), 20, 0.15),
        Kind("33x480x832", _clip(33, 480, 832), 10, 0.25),
        Kind("81x480x832", _clip(81, 480, 832), 10, 0.6),
    ),
}


def arrivals(kinds: Sequence[Kind], rate: float, duration_s: float, seed: int) -> list[tuple[float, Kind]]:
    """A Poisson process, the same for each run with a seed."""
    rng = random.Random(seed)
    found, at = [], rng.expovariate(rate)
    while at < duration_s:
        found.append((at, rng.choices(kinds, [kind.share for kind in kinds])[0]))
        at += rng.expovariate(rate)
    return found


async def ask(http: httpx2.AsyncClient, kind: Kind, index: int) -> int:
    """One request, to its end; :return: the status of its answer."""
    request = kind.request(index)
    if "num_frames" not in kind.size:
        answer = await http.post("/v1/images/generations", json=image_body(request))
        return answer.status_code
    answer = await http.post("/v1/videos", json={**request, "size": f"{request['width']}x{request['height']}"})
    while answer.status_code == 200 and answer.json()["status"] not in ("completed", "failed", "cancelled"):
        await asyncio.sleep(_POLL_S)
        answer = await http.get(f"/v1/videos/{answer.json()['id']}")
    return 500 if answer.status_code == 200 and answer.json()["status"] != "completed" else answer.status_code


async def alone_s(
    http: httpx2.AsyncClient, kinds: Sequence[Kind], indices: Iterator[int], num: int
) -> dict[str, float]:
    """What a request of each kind takes among so many, one for each GPU: the median of some, or of one that takes long.

    :raises RuntimeError: one was refused, or failed.
    """
    return {kind.name: statistics.median([s async for s in _some_alone(http, kind, indices, num)]) for kind in kinds}


async def _some_alone(http: httpx2.AsyncClient, kind: Kind, indices: Iterator[int], num: int) -> AsyncIterator[float]:
    async def one() -> float:
        start = time.perf_counter()
        status = await ask(http, kind, next(indices))
        if status != 200:
            raise RuntimeError(f"a request of {kind.name} was answered with {status}")
        return time.perf_counter() - start

    begun = time.perf_counter()
    for _ in range(_NUM_ALONE):
        for seconds in await asyncio.gather(*(one() for _ in range(num))):
            yield seconds
        if time.perf_counter() - begun > _ALONE_S:
            return


async def replay(
    http: httpx2.AsyncClient,
    trace: Sequence[tuple[float, Kind]],
    asked: Sequence[Asked],
    limit_s: float | None = None,
) -> None:
    """Send each request at its time, whatever became of the others.

    :param asked: where it is written down.
    :param limit_s: after so long those that have no answer are left alone.
    """
    start = time.monotonic()

    async def one(index: int) -> None:
        at, kind = trace[index]
        await asyncio.sleep(max(start + at - time.monotonic(), 0))
        sent = time.monotonic()
        asked[index].arrives_at = sent - start
        with suppress(httpx2.TransportError):
            asked[index].status = await ask(http, kind, index)
        asked[index].latency_s = time.monotonic() - sent

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            for index in range(len(trace)):
                group.create_task(one(index))

    with suppress(TimeoutError):
        await asyncio.wait_for(all_of_them(), limit_s)


def decided(asked: Sequence[Asked], alone: Mapping[str, float], until: float) -> list[Asked]:
    """Those that have their answers at this time of the trace, and those that are late without."""
    return [one for one in asked if one.status or one.arrives_at + SLO_SCALE * alone[one.kind] < until]


def summary(asked: Sequence[Asked], alone: Mapping[str, float]) -> dict[str, Any]:
    """By kind and of all: latencies, the share in time, goodput, refusals."""
    span_s = max((one.arrives_at + one.latency_s for one in asked), default=1.0)
    return {
        name: _of_some([one for one in asked if name in ("all", one.kind)], alone, span_s) for name in (*alone, "all")
    }


def _of_some(asked: Sequence[Asked], alone: Mapping[str, float], span_s: float) -> dict[str, Any]:
    done = sorted(one.latency_s for one in asked if one.is_done)
    in_time = sum(one.is_done and one.latency_s <= SLO_SCALE * alone[one.kind] for one in asked)
    found: dict[str, Any] = {"num": len(asked), "num_done": len(done), "num_429": sum(o.status == 429 for o in asked)}
    if done:
        found |= {"mean_s": statistics.fmean(done), **{f"p{q}_s": percentile(done, q) for q in (50, 95, 99)}}
    return found | {"in_time": in_time / max(len(asked), 1), "goodput_per_s": in_time / span_s}


@dataclass
class Replay:
    """What is asked for, and what came of it so far."""

    args: argparse.Namespace
    folder: Path
    """What the server keeps, and its trace."""
    kinds: Sequence[Kind]
    where: Mapping[str, Any]
    """This machine."""
    alone_s: Mapping[str, float] = field(default_factory=dict)
    """What a request of each kind takes on a GPU of its own, and"""
    lone_s: Mapping[str, float] = field(default_factory=dict)
    """while there is no other: it may have several."""
    since_s: float = 0.0
    """When everything was warm, by time.monotonic."""
    begins_s: float = 0.0
    lasted_s: float = 0.0
    """From there to its last answer, or to where it was cut off; 0 as long as it goes on."""
    rate: float = 0.0
    seconds: float = 0.0
    """In which requests come."""
    asked: Sequence[Asked] = ()
    server: Mapping[str, Any] = field(default_factory=dict)
    eta_errors: Mapping[str, float] = field(default_factory=dict)
    """How far predictions for clients were from what came, as part of it: the mean by when they were told."""

    @property
    def trace(self) -> Path:
        """Where the server writes what it runs."""
        return self.folder / "trace.json"

    def report(self) -> dict[str, Any]:
        """All that is known, and that the simulation needs."""
        until = self.lasted_s or time.monotonic() - self.begins_s
        sent = [one for one in self.asked if one.arrives_at <= until]
        return {
            "command": reports.command(),
            **self.where,
            "mix": self.args.mix,
            "load": self.args.load,
            "rate_per_s": self.rate,
            "minutes": round(min(self.seconds, until) / 60, 2),
            "steps": self.args.steps,
            "alone_s": self.alone_s,
            "lone_s": self.lone_s,
            "num_ranks": self.args.elastic,
            "summary": summary(decided(sent, self.alone_s, until), self.alone_s),
            "server": self.server,
            "eta_errors": self.eta_errors,
            "asked": [asdict(one) for one in sent],
            **self._learned(),
        }

    def _learned(self) -> dict[str, Any]:
        """What forwards took, and which calls requests make; nothing as long as the server has kept nothing."""
        if self.args.url or self.args.mix not in PICTURES:
            return {}
        try:
            learned, trace = measured.read(self.folder / "cache"), ticks.read(self.trace)
        except FileNotFoundError:
            return {}
        learned = measured.with_forwards(learned, ticks.forwards(trace, self.since_s))
        found = {"learned": msgspec.to_builtins(learned), "leads_s": ticks.leads_s(trace)}
        return {**found, **measured.gaps(ticks.gaps_s(trace, self.since_s))}

    def keep(self) -> None:
        """Write it down, once there is something."""
        report = self.report()
        if self.args.out and report["asked"]:
            reports.write(self.args.out, report, text(report))
            with suppress(FileNotFoundError):
                shutil.copy(ticks.file_of(self.trace), self.args.out.with_suffix(".trace"))


async def run(replaying: Replay, budget: Budget) -> None:
    """Measure and replay."""
    args, kinds = replaying.args, replaying.kinds
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(_client(args, replaying))
        await _warm_up(http, kinds, args.warm_up_s, args.elastic)
        replaying.since_s, indices = time.monotonic(), count(_ALONE)
        replaying.lone_s = replaying.alone_s = alone = await alone_s(http, kinds, indices, 1)
        if args.elastic > 1:
            print("lone:", {name: round(s, 3) for name, s in alone.items()}, flush=True)
            replaying.alone_s = alone = await alone_s(http, kinds, indices, args.elastic)
        print("alone:", {name: round(s, 3) for name, s in alone.items()}, flush=True)
        replaying.rate = args.elastic * args.load / sum(kind.share * alone[kind.name] for kind in kinds)
        replaying.seconds = min(60 * args.minutes, budget.left_s - _REST_FACTOR * max(alone.values()) - _REST_S)
        if replaying.seconds <= 0:
            raise SystemExit(f"of {args.seconds:g} s none are left for the trace; give more --seconds")
        print(f"replaying {replaying.seconds:.0f} s", flush=True)
        replaying.server = (await http.get("/server_info")).json()["model"]
        trace = arrivals(kinds, replaying.rate, replaying.seconds, args.seed)
        replaying.asked = [Asked(kind.name, at) for at, kind in trace]
        keeping = asyncio.create_task(_keep_writing(replaying))
        stack.callback(keeping.cancel)
        replaying.begins_s = time.monotonic()
        try:
            await replay(http, trace, replaying.asked, budget.left_s - _REST_S if args.seconds else None)
        finally:
            replaying.lasted_s = time.monotonic() - replaying.begins_s
        replaying.server = (await http.get("/server_info")).json()["model"]
        replaying.eta_errors = eta_errors((await http.get("/metrics")).text)
        replaying.keep()


def eta_errors(metrics: str) -> dict[str, float]:
    """Of what /metrics says: the mean error of predictions, by when they were told."""
    found = re.findall(r'^sgld:eta_error_ratio_(sum|count)\{told="(\w+)"\} (\S+)$', metrics, re.MULTILINE)
    by_name = {(part, told): float(value) for part, told, value in found}
    return {told: by_name["sum", told] / number for (part, told), number in by_name.items() if part == "count"}


async def _keep_writing(replaying: Replay) -> None:
    while True:
        await asyncio.sleep(_KEEP_S)
        # Beside the requests, which are timed.
        await asyncio.to_thread(replaying.keep)


@asynccontextmanager
async def _client(args: argparse.Namespace, replaying: Replay) -> AsyncIterator[httpx2.AsyncClient]:
    """Of a server that runs, or of one that is started for it."""
    if args.url:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=args.url, timeout=None, limits=limits) as http:
            yield http
        return
    flags = ["--model-path", str(args.model_path), "--device", args.device, "--trace", str(replaying.trace)]
    flags += [] if args.elastic == 1 else ["--num-gpus", str(args.elastic), "--elastic-sp"]
    flags += args.serve_flags
    environment = {"SGLANG_DIFFUSION_CACHE_ROOT": str(replaying.folder / "cache")}
    async with serving(replaying.folder, flags, environment) as server, server.client() as http:
        print(f"ready after {await ready_s(server, http, args.ready_s):.1f} s", flush=True)
        try:
            yield http
        finally:
            if args.out:
                args.out.with_suffix(".log").write_text(server.said())


def with_simulation(report: dict[str, Any], num_requests: int) -> dict[str, Any]:
    """The same arrivals, simulated with the times that were measured; and so many more."""
    mix, num_ranks = measured.mix_of(report), report.get("num_ranks", 1)
    asked = [Asked(**one) for one in report["asked"]]
    simulation = agreement.against_simulation(asked, mix, num_ranks, report.get("gap_s", 0.0))
    # bench/degrees.py makes the claim of several GPUs.
    claim = agreement.claim(mix, num_requests) if num_ranks == 1 else []
    return {**report, "simulation": simulation, "times": measured.as_rows(mix), "claim": claim}


async def _warm_up(http: httpx2.AsyncClient, kinds: Sequence[Kind], seconds: float, num_ranks: int) -> None:
    """Requests with few steps, alone and several at once: things are compiled, captured and proved.

    Each kind once, and then for so long.
    """
    until, indices = time.monotonic() + seconds, count(_WARM_UP)
    # Some at once encode together, too.
    asked = [*product(kinds, _rounds(num_ranks)), (kinds[0], (4, _FEW_STEPS[0][1]))]
    while True:
        for kind, (together, num_steps) in asked:
            short = replace(kind, num_steps=num_steps)
            await asyncio.gather(*(ask(http, short, next(indices)) for _ in range(together)))
        if time.monotonic() > until:
            return


def _rounds(num_ranks: int) -> Sequence[tuple[int, int]]:
    """So many requests at once, and with how many steps.

    1. A rank for each, so that each knows its own graphs.
    2. One that tries all numbers of ranks, and decodes until the least of these is known.
    3. Several for each number of ranks that some share.
    4. More than there are ranks: they share forwards.
    """
    if num_ranks == 1:
        return _FEW_STEPS
    num_degrees = num_ranks.bit_length() - 1
    some = [(num_ranks >> n, _TRIES) for n in range(1, num_degrees)]
    lone = [(1, num_degrees * _TRIES + 2), *[(1, 2)] * (PATIENCE - 1)]
    return [(num_ranks, _TRIES), *lone, *some, (2 * num_ranks, _FEW_STEPS[1][1])]


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    several = report.get("num_ranks", 1) > 1
    on = f" on {report['num_ranks']} GPUs that share forwards as it pays" if several else ""
    lines = [f"# Mix {report['mix']} at load {report['load']:g}{on}", "", f"`{report['command']}`", ""]
    steps = "" if report["steps"] == 1 else f" Requests have {report['steps']:.0%} of their steps."
    rate = f"{report['rate_per_s']:.3f} requests a second, Poisson, for {report['minutes']:g} minutes"
    lines += [f"{report['machine']}; {versions}. {rate}.{steps} Seconds.", ""]
    lines += [
        "| requests | number | alone | mean | p50 | p95 | p99 | in time | goodput, 1/s | 429 |",
        "|---" * 10 + "|",
    ]
    for name, found in report["summary"].items():
        cells = [name, str(found["num"]), f"{report['alone_s'][name]:.2f}" if name in report["alone_s"] else ""]
        cells += [f"{found[key]:.2f}" if key in found else "" for key in ("mean_s", "p50_s", "p95_s", "p99_s")]
        cells += [f"{found['in_time']:.3f}", f"{found['goodput_per_s']:.3f}", str(found["num_429"])]
        lines.append("| " + " | ".join(cells) + " |")
    if several:
        lone = ", ".join(f"{name} {lone_s:.2f} s" for name, lone_s in report["lone_s"].items())
        lines += ["", f"Alone is on a GPU of its own. With all of them to itself a request takes: {lone}."]
    if report.get("eta_errors"):
        errors = ", ".join(f"{error:.0%} when {told}" for told, error in report["eta_errors"].items())
        lines += ["", f"Predictions for clients differed from what came, in the mean, by {errors}."]
    if "simulation" in report:
        lines += ["", *agreement.text(report)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path)
    parser.add_argument("--make", choices=list(MODELS), help="make this model first, and remove it afterwards")
    parser.add_argument("--models", type=Path, help="make it in this folder, where it stays and is found again")
    parser.add_argument("--again", type=Path, help="a report whose simulation is to be made")
    parser.add_argument("--no-simulation", action="store_true", help="leave that to another run")
    parser.add_argument("--seconds", type=float, help="all in all, without the simulation")
    parser.add_argument("--ready-s", type=float, default=180.0, help="seconds until the server must be ready")
    parser.add_argument("--url", help="a server that runs")
    parser.add_argument("--elastic", type=int, default=1, help="GPUs that share forwards as it pays")
    parser.add_argument("--mix", choices=list(MIXES), default="C")
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument(
        "--steps", type=float, default=1.0, help="share of each request's steps, to try it in less time"
    )
    parser.add_argument(
        "--params", type=json.loads, default={}, help="further sampling params of each request, as JSON"
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--warm-up-s", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--requests", type=int, default=10_000, help="of the simulation that the claim is made of")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="make a model with next to no layers")
    parser.add_argument("--out", type=Path, help="writes FILE.json, FILE.md, and beside them trace and log")
    parser.add_argument("serve_flags", nargs="*", help="further flags of sgld serve, behind --")
    args = parser.parse_args()
    report = json.loads(args.again.read_text()) if args.again else measured_report(args, Budget(args.seconds))
    if args.again and "learned" not in report:
        raise SystemExit(f"{args.again} has no times of forwards: nothing can be simulated")
    if "learned" in report and not args.no_simulation:
        report = with_simulation(report, args.requests)
        if args.out:
            reports.write(args.out, report, text(report))
    print(text(report))


def measured_report(args: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    """What a server does here, with the times that it learned."""
    with tempfile.TemporaryDirectory(dir=RAM_DISK) as made, tempfile.TemporaryDirectory() as folder:
        if args.make:
            models = args.models or Path(made)
            extra = ["--tiny"] if args.tiny else []
            make = [sys.executable, "-W", "ignore", str(HERE / "real_models.py"), str(models), args.make]
            subprocess.run([*make, "--device", args.device, *extra], check=True)
            args.model_path = models / args.make
        where = reports.where(args.device)
        replaying = Replay(args, Path(folder), mix_of(args.mix, args.steps, args.params), where)
        with suppress(KeyboardInterrupt):
            asyncio.run(run(replaying, budget))
        if not replaying.asked:
            raise SystemExit("ended before the trace began")
        replaying.keep()
        return replaying.report()


if __name__ == "__main__":
    main()
