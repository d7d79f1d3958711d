"""How does `sgld serve` do when requests come as they like? Open-loop Poisson traces over HTTP.

    python bench/serving.py --model-path FOLDER [--mix C] [--load 0.7] [--minutes 8] [--out bench/results/serving_c]
    python bench/serving.py --make flux ...        makes the model first (bench/real_models.py)
    python bench/serving.py --url http://...       asks a server that runs; then nothing is simulated
    python bench/serving.py --again REPORT.json --out ...      simulates what an earlier run measured, on any machine

What a request of each class takes alone is measured first; so load 1 is what the server does without merging. Arrivals
don't wait for answers. "In time" is within 3 times what such a request takes alone; goodput counts those. Then the
same arrivals go through the simulation of bench/queueing.py, with the times that the server learned meanwhile: at
once, or later with `--no-simulation` and `--again`. The report is written as soon as requests have their answers, and
has those that were answered if the run is ended early; with `--seconds` the trace is as long as there is time for.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too
os.environ.setdefault("TQDM_DISABLE", "1")

import httpx2
import measured
import msgspec
import policies
import queueing
import reports
from budget import Budget
from measured import Measured
from policies import SLO_SCALE, Class
from real_models import MODELS, prompt
from served import image_body, ready_s, serving

from sgld.engine.learned import Learned

HERE = Path(__file__).parent
RAM_DISK = "/dev/shm"
_NUM_ALONE = 2
# To write the report, and to wait for the last answers; as many times the longest request.
_REST_S, _REST_FACTOR = 5.0, 3.0
_FEW_STEPS = 8
# Prompts and seeds of requests that aren't part of the trace begin here.
_ALONE, _WARM_UP = 700, 800
_POLL_S = 0.2
_SIMULATED = ("FIFO", "sgld")
_LOADS = (0.5, 0.7, 0.85)


@dataclass(frozen=True)
class Kind:
    """Requests of one kind, and their share of all."""

    name: str
    size: Mapping[str, int]
    num_steps: int
    share: float

    def request(self, index: int) -> dict[str, Any]:
        """Sampling params; each request has a prompt and a seed of its own."""
        return {
            "prompt": prompt(index),
            "seed": index,
            **self.size,
            "num_inference_steps": self.num_steps,
        }


def _pictures(mix: Sequence[Class]) -> tuple[Kind, ...]:
    return tuple(Kind(of.name, {"height": of.side, "width": of.side}, of.num_steps, of.share) for of in mix)


def _clip(frames: int, height: int, width: int) -> dict[str, int]:
    return {"num_frames": frames, "height": height, "width": width}


# To try the script: as mix C, small and with few steps.
_TINY = (Class(32, 4, 0.15), Class(48, 4, 0.25), Class(64, 5, 0.45), Class(96, 7, 0.15))
PICTURES: Mapping[str, Sequence[Class]] = {**policies.MIXES, "tiny": _TINY}


def mix_of(name: str, share: float) -> tuple[Kind, ...]:
    """A mix by its name, whose requests have this share of their steps."""
    return tuple(replace(kind, num_steps=max(round(share * kind.num_steps), 2)) for kind in MIXES[name])


MIXES = {
    **{name: _pictures(mix) for name, mix in PICTURES.items()},
    "video": (
        Kind("17x256x256", _clip(17, 256, 256), 20, 0.15),
        Kind("33x480x832", _clip(33, 480, 832), 10, 0.25),
        Kind("81x480x832", _clip(81, 480, 832), 10, 0.6),
    ),
}


@dataclass
class Asked:
    """One request: when it was sent, by the clock of the trace, and what came of it."""

    kind: str
    arrives_at: float
    latency_s: float = 0.0
    status: int = 0
    """Of HTTP; 0 while there is no answer."""

    @property
    def is_done(self) -> bool:
        return self.status == 200


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


async def alone_s(http: httpx2.AsyncClient, kinds: Sequence[Kind]) -> dict[str, float]:
    """What a request of each kind takes when there is no other.

    :raises RuntimeError: one was refused, or failed.
    """
    taken: dict[str, list[float]] = {kind.name: [] for kind in kinds}
    for index in range(_NUM_ALONE):
        for kind in kinds:
            start = time.perf_counter()
            status = await ask(http, kind, _ALONE + index)
            if status != 200:
                raise RuntimeError(f"a request of {kind.name} was answered with {status}")
            taken[kind.name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


async def replay(
    http: httpx2.AsyncClient, trace: Sequence[tuple[float, Kind]], limit_s: float | None = None
) -> list[Asked]:
    """Send each request at its time, whatever became of the others.

    :param limit_s: after so long those that have no answer are left alone.
    """
    asked = [Asked(kind.name, at) for at, kind in trace]
    start = time.monotonic()

    async def one(index: int) -> None:
        at, kind = trace[index]
        await asyncio.sleep(max(start + at - time.monotonic(), 0))
        sent = time.monotonic()
        asked[index].arrives_at = sent - start
        asked[index].status = await ask(http, kind, index)
        asked[index].latency_s = time.monotonic() - sent

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            for index in range(len(trace)):
                group.create_task(one(index))

    with suppress(TimeoutError):
        await asyncio.wait_for(all_of_them(), limit_s)
    return asked


def summary(asked: Sequence[Asked], alone: Mapping[str, float]) -> dict[str, Any]:
    """By kind and of all: latencies, the share in time, goodput, refusals."""
    span_s = max(one.arrives_at + one.latency_s for one in asked)
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


def percentile(ordered: Sequence[float], percent: int) -> float:
    """Of values in order: the least that so many per cent don't exceed."""
    return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)]


def simulated(asked: Sequence[Asked], mix: Sequence[Measured], alone: Mapping[str, float]) -> list[float]:
    """Latencies of the same arrivals in the simulation; and what a lone request takes beside forwards."""
    by_name = {of.name: of for of in mix}
    jobs = [policies.Job(number, by_name[one.kind], one.arrives_at) for number, one in enumerate(asked)]
    queueing.simulate(policies.POLICIES["sgld"](), jobs)
    return [job.latency_s + max(alone[job.of.name] - job.of.alone_s, 0) for job in jobs]


def against_simulation(asked: Sequence[Asked], mix: Sequence[Measured], alone: Mapping[str, float]) -> dict[str, Any]:
    """How far what was measured is from the simulation, request by request and in the mean."""
    expected_s = simulated(asked, mix, alone)
    pairs = [(one.latency_s, expected) for one, expected in zip(asked, expected_s, strict=True) if one.is_done]
    differences = sorted(abs(seen - expected) / expected for seen, expected in pairs)
    means = [statistics.fmean(part) for part in zip(*pairs, strict=True)]
    return {
        "mean_s": {"measured": means[0], "simulated": means[1]},
        "mean_differs": means[0] / means[1] - 1,
        "median_difference": percentile(differences, 50),
        "p90_difference": percentile(differences, 90),
    }


def claim(mix: Sequence[Measured], num_requests: int) -> list[dict[str, Any]]:
    """What the simulation says of many requests with these times."""
    return [
        asdict(queueing.point("measured", load, name, num_requests, 1, classes=mix))
        for load in _LOADS
        for name in _SIMULATED
    ]


async def run(args: argparse.Namespace, folder: Path, budget: Budget) -> dict[str, Any]:
    """Measure and replay; what the server learns is kept in the folder."""
    kinds = mix_of(args.mix, args.steps)
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(_client(args, folder))
        await _warm_up(http, kinds, args.warm_up_s)
        alone = await alone_s(http, kinds)
        print("alone:", {name: round(s, 3) for name, s in alone.items()}, flush=True)
        rate = args.load / sum(kind.share * alone[kind.name] for kind in kinds)
        seconds = min(60 * args.minutes, budget.left_s - _REST_FACTOR * max(alone.values()) - _REST_S)
        if seconds <= 0:
            raise SystemExit(f"of {args.seconds:g} s none are left for the trace; give more --seconds")
        print(f"replaying {seconds:.0f} s", flush=True)
        limit_s = budget.left_s - _REST_S if args.seconds else None
        asked = await replay(http, arrivals(kinds, rate, seconds, args.seed), limit_s)
        report = {
            "command": reports.command(),
            **reports.where(args.device),
            "mix": args.mix,
            "load": args.load,
            "rate_per_s": rate,
            "minutes": round(seconds / 60, 2),
            "steps": args.steps,
            "alone_s": alone,
            "summary": summary(asked, alone),
            "server": (await http.get("/server_info")).json()["model"],
            "asked": [asdict(one) for one in asked],
        }
        if args.out:
            reports.write(args.out, report, text(report))
        return report


@asynccontextmanager
async def _client(args: argparse.Namespace, folder: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """Of a server that runs, or of one that is started for it."""
    if args.url:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=args.url, timeout=None, limits=limits) as http:
            yield http
        return
    flags = ["--model-path", str(args.model_path), "--device", args.device, *args.serve_flags]
    environment = {"SGLANG_DIFFUSION_CACHE_ROOT": str(folder / "cache")}
    async with serving(folder, flags, environment) as server, server.client() as http:
        print(f"ready after {await ready_s(server, http, args.ready_s):.1f} s", flush=True)
        yield http


def with_simulation(report: dict[str, Any], num_requests: int) -> dict[str, Any]:
    """The same arrivals, simulated with the times that the server learned; and so many more."""
    steps = [kind.num_steps for kind in mix_of(report["mix"], report["steps"])]
    classes = [replace(of, num_steps=n) for of, n in zip(PICTURES[report["mix"]], steps, strict=True)]
    learned = msgspec.convert(report["learned"], Learned)
    mix = measured.classes(learned, classes, policies.MAX_BATCH_SIZE)
    asked = [Asked(**one) for one in report["asked"]]
    found = {"simulation": against_simulation(asked, mix, report["alone_s"]), "times": measured.as_rows(mix)}
    return {**report, **found, "claim": claim(mix, num_requests)}


async def _warm_up(http: httpx2.AsyncClient, kinds: Sequence[Kind], seconds: float) -> None:
    """Requests with few steps, alone and several at once, for so long: things are compiled, captured and proved."""
    kinds = [replace(kind, num_steps=min(kind.num_steps, _FEW_STEPS)) for kind in kinds]
    until, indices = time.monotonic() + seconds, count(_WARM_UP)
    while time.monotonic() < until:
        for kind in kinds:
            for together in (1, 4):
                await asyncio.gather(*(ask(http, kind, next(indices)) for _ in range(together)))


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [f"# Mix {report['mix']} at load {report['load']:g}", "", f"`{report['command']}`", ""]
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
    if "simulation" in report:
        lines += ["", *_simulation(report)]
    return "\n".join(lines) + "\n"


def _simulation(report: dict[str, Any]) -> list[str]:
    found = report["simulation"]
    means, median, p90 = found["mean_s"], found["median_difference"], found["p90_difference"]
    lines = [
        "The simulation of the same arrivals, with the times that the server learned, has a mean of "
        f"{means['simulated']:.2f} s; measured were {means['measured']:.2f} s ({found['mean_differs']:+.1%}). Request "
        f"by request the difference is {median:.1%} in the median, {p90:.1%} at p90.",
        "",
        "| load, simulated | policy | mean | p95 | in time |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {p['load']:g} | {p['policy']} | {p['mean_s']:.2f} | {p['p95_s']:.2f} | {p['slo']:.3f} |"
        for p in report["claim"]
    ]
    lines += ["", "| class | encode, ms | decode, ms | a step of 1, 2, ... requests, ms |", "|---|---|---|---|"]
    for row in report["times"]:
        steps = ", ".join(f"{ms:.1f}" for ms in row["step_ms"])
        lines.append(f"| {row['class']} | {row['encode_ms']:.1f} | {row['decode_ms']:.1f} | {steps} |")
    return lines


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
    parser.add_argument("--mix", choices=list(MIXES), default="C")
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument(
        "--steps", type=float, default=1.0, help="share of each request's steps, to try it in less time"
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--warm-up-s", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--requests", type=int, default=10_000, help="of the simulation that the claim is made of")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="make a model with next to no layers")
    parser.add_argument("--out", type=Path, help="writes FILE.json and FILE.md")
    parser.add_argument("serve_flags", nargs="*", help="further flags of sgld serve, behind --")
    args = parser.parse_args()
    report = json.loads(args.again.read_text()) if args.again else measured_report(args, Budget(args.seconds))
    if args.out:
        reports.write(args.out, report, text(report))
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
        report = asyncio.run(run(args, Path(folder), budget))
        if not args.url and args.mix in PICTURES:
            report["learned"] = msgspec.to_builtins(measured.read(Path(folder) / "cache"))
        return report


if __name__ == "__main__":
    main()
