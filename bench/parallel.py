"""What do several GPUs gain: on one forward that they share, on guidance, and on forwards side by side?

python bench/parallel.py [--device cuda] [--gpus 4] [--seconds 260] [--parts tokens rows] [--out bench/results/parallel]

Models at their real size with random weights; ranks as the engine has them, CUDA graphs included. Beside them plain
diffusers on one GPU, and its own context parallelism. Parts are measured in the order of what they are worth, each
number is said and written as soon as it is known, and what doesn't fit into the seconds that there are is left out. The
table of times by size, requests and GPUs is in the report, too: bench/degrees.py simulates with it (`--table
FILE.json`).
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too
# Many ranks compile at the same time.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "8")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import copies
import reports
import torch
import torch.multiprocessing
from budget import Budget
from crews import Crew, Ended, Row, start
from forwards import BESIDE, Part, Work, measure

from sgld.parallel import ParallelConfig

Group = tuple[Part, ...]
"""Parts that compile beside one another, and are then measured one after the other; before those that don't compile."""
FLUX_1024, FLUX_1536 = Work("flux", (1024,)), Work("flux", (1536,))
WAN, GUIDANCE = Work("wan", (81, 480, 832)), Work("wan", (33, 480, 832), rows=2)
SMALL = (Work("flux", (512,)), Work("flux", (768,)))
MORE = (*(Work("flux", (side,), rows) for side, rows in ((512, 2), (1024, 2), (768, 2), (512, 4))),)
# So long nothing is quiet that doesn't compile.
QUIET_S, COMPILING_S = 60.0, 200.0
# What is kept for measuring what was compiled in time.
MEASURING_S = 25.0
_ROOM_FOR_THREE_BYTES = 100 * 10**9


def groups(gpus: int, *, has_room: bool) -> list[Group]:
    """All parts, those first that are worth most.

    :param has_room: a GPU has room for FLUX three times.
    """
    elastic, every = ParallelConfig(num_gpus=gpus, elastic_sp=True), ParallelConfig(num_gpus=gpus)
    guidance, one = ParallelConfig(num_gpus=2, enable_cfg_parallel=True), ParallelConfig()
    rings = [ParallelConfig(ring_degree=gpus)]
    rings += [ParallelConfig(ulysses_degree=gpus // 2, ring_degree=2)] if gpus > 2 else []
    flux = (FLUX_1024, FLUX_1536)
    compiled = (
        *(Part(f"rings of Wan, {shape.ring}", "sgld", (WAN,), 20, shape, is_aside=True) for shape in rings),
        Part("FLUX, compiled", "sgld", flux, 90, one, is_compiled=True),
        Part("tokens of FLUX, compiled", "sgld", flux, 90, every, is_compiled=True),
        Part("Wan, compiled", "sgld", (WAN,), 90, one, is_compiled=True),
        Part("tokens of Wan, compiled", "sgld", (WAN,), 90, every, is_compiled=True),
        Part("tokens of Wan, compiled, diffusers", "diffusers", (WAN,), 90, every, is_compiled=True),
        Part("tokens of FLUX, compiled, diffusers", "diffusers", (FLUX_1024,), 90, every, is_compiled=True),
    )
    return [
        (Part("tokens of FLUX", "sgld", flux, 55, elastic, has_one=True, all_degrees=True, beside=(FLUX_1024,)),),
        (Part("tokens of FLUX, diffusers", "diffusers", flux, 20, every),),
        (Part("tokens of Wan", "sgld", (WAN,), 35, elastic, has_one=True, all_degrees=True),),
        (Part("tokens of Wan, diffusers", "diffusers", (WAN,), 18, every),),
        (Part("rows of Wan", "sgld", (GUIDANCE,), 25, guidance, has_one=True),),
        compiled if has_room else compiled[:-1],
        (Part("tokens of small FLUX", "sgld", SMALL, 25, elastic, has_one=True, all_degrees=True, beside=SMALL),),
        (Part("tokens of FLUX, more rows", "sgld", MORE, 35, elastic, all_degrees=True),),
        (Part("copies of SDXL", "sgld", (), 170, one, copies=gpus),),
        (Part("tiles of a VAE", "sgld", (Work("vae", (2048,)),), 20, every, has_one=True),),
    ]


def chosen(all_groups: Sequence[Group], words: Sequence[str], by: Sequence[str]) -> list[Group]:
    """Those whose names have one of these words, none: all; of whose code is named."""

    def is_wanted(part: Part) -> bool:
        return part.by in by and (not words or any(word in part.name for word in words))

    kept = (tuple(part for part in group if is_wanted(part)) for group in all_groups)
    return [group for group in kept if group]


class Bench:
    """Parts one after the other, within a budget.

    :param args: of the command line.
    :param measure: runs in each rank.
    """

    def __init__(self, args: argparse.Namespace, measure: Callable[..., None] = measure) -> None:
        self._args, self._measure_in_rank = args, measure
        self._context = torch.multiprocessing.get_context("spawn")
        self._budget, self._begun = Budget(args.seconds), time.monotonic()
        self._where = reports.where(args.device)
        self._rows: list[Row] = []
        self._problems: list[str] = []

    def run(self, all_groups: Sequence[Group]) -> None:
        """Measure what fits. The processes of the next group import meanwhile what they need."""
        waiting, ahead = list(all_groups), list[Crew]()
        if self._args.tiny:
            waiting = [tuple(part.tiny() for part in group) for group in waiting]
        while waiting:
            group, crews = waiting.pop(0), ahead
            ahead = []
            names, long_s = ", ".join(part.name for part in group), expected_s(group)
            if not self._budget.has(long_s):
                self.say(f"left out, as {long_s:.0f} s may be needed and {self._budget.left_s:.0f} are left: {names}")
                self._problems.append(f"left out: {names}")
                _end(crews)
                continue
            self.say(names)
            crews = crews or self._started(group)
            try:
                if waiting and self._args.ahead and self._budget.has(long_s + expected_s(waiting[0])):
                    ahead = self._started(waiting[0])
                self._measure(group, crews)
            finally:
                _end(crews)
        self.write()

    def _started(self, group: Group) -> list[Crew]:
        args = self._args
        return [
            start(
                self._context,
                part.name,
                part.parallel.num_ranks,
                copies.measure if part.copies else self._measure_in_rank,
                (part, args.device, args.tiny),
            )
            for part in group
        ]

    def _measure(self, group: Group, crews: Sequence[Crew]) -> None:
        pairs = list(zip(group, crews, strict=True))
        compiling = [crew for part, crew in pairs if part.is_compiled]
        for crew in compiling:
            crew.open("imported")
        for part, crew in [(part, crew) for part, crew in pairs if not part.is_compiled]:
            crew.open("imported")
            self._hears(crew, max(self._args.quiet_s, part.expected_s), lambda: self._budget.left_s)
            crew.end()
        for crew in [crew for crew in compiling if self._compiles(crew)]:
            crew.open("compiled")
            self._hears(crew, self._args.quiet_s, lambda: self._budget.left_s)

    def _compiles(self, crew: Crew) -> bool:
        """Wait until ranks have compiled; false if they fail, or there would be no time to measure what they have."""
        return self._hears(crew, COMPILING_S, lambda: max(self._budget.left_s - MEASURING_S, 0.0), until="compiled")

    def _hears(self, crew: Crew, quiet_s: float, left_s: Callable[[], float], until: str | None = None) -> bool:
        """Listen to ranks; false if they failed."""
        try:
            for row in crew.rows(quiet_s, left_s, until):
                self._rows.append(row)
                self.say(as_line(row, self._rows))
                self.write()
        except Ended as error:
            self.say(f"{crew.name}: {error}")
            self._problems.append(f"{crew.name}: {error}")
            crew.end()
            return False
        if until is not None:
            self.say(f"{crew.name}: {until}")
        return True

    def say(self, line: str) -> None:
        """With the seconds since the beginning."""
        print(f"[{time.monotonic() - self._begun:5.0f} s] {line}", flush=True)

    def write(self) -> str:
        """The report, as far as it is known."""
        report = {
            "command": reports.command(),
            **self._where,
            "gpus": self._args.gpus,
            "measured": self._rows,
            "rows": degrees(self._rows),
            "problems": self._problems,
        }
        text = as_text(report)
        if self._args.out is not None:
            reports.write(self._args.out, report, text)
        return text


def expected_s(group: Group) -> float:
    """What all parts of a group take that prepare together."""
    return max(part.expected_s for part in group)


def _end(crews: Sequence[Crew]) -> None:
    for crew in crews:
        crew.end()


def best(rows: Sequence[Row], work: str, gpus: int, by: str) -> Row | None:
    """The fastest way in which one forward at a time ran."""
    those = [row for row in rows if (row["work"], row["gpus"], row["by"]) == (work, gpus, by)]
    return min((row for row in those if row["how"] != BESIDE), key=lambda row: float(row["ms"]), default=None)


def gains(row: Row, rows: Sequence[Row]) -> tuple[str, str]:
    """How much faster than one GPU at its best with sgld, and than plain diffusers on one."""
    num = row["gpus"] if row["how"] == BESIDE else 1
    ones = best(rows, row["work"], 1, "sgld"), best(rows, row["work"], 1, "diffusers")
    here, theirs = (f"{num * one['ms'] / row['ms']:.2f}x" if one is not None else "" for one in ones)
    return here, theirs


def as_line(row: Row, rows: Sequence[Row]) -> str:
    here, theirs = gains(row, rows)
    gpus = f"{row['gpus']} GPU" + ("s" if row["gpus"] > 1 else "")
    told = ", ".join(filter(None, (row["work"], row["by"], gpus, row["layout"], row["how"])))
    gained = f"{here or '-'} sgld's one, {theirs or '-'} diffusers' one"
    return f"{told}: {row['ms']:.1f} ms, {gained}, error {row['error']:.1g}"


def as_text(report: Row) -> str:
    """The table, for people."""
    rows = report["measured"]
    lines = [
        "# Several GPUs",
        "",
        f"`{report['command']}`",
        "",
        f"{report['machine']}. Median forward, ms. Gains: against the best that one GPU does here with sgld, and "
        "against plain diffusers, eagerly, on one GPU; of forwards beside one another, by how many are done in a time. "
        "Error: relative, against one GPU. With a star: others compiled meanwhile.",
        "",
    ]
    cells = []
    for work in dict.fromkeys(row["work"] for row in rows):
        for row in sorted((row for row in rows if row["work"] == work), key=lambda row: (row["gpus"], row["by"])):
            known = (work, row["by"], row["gpus"], row["layout"], row["how"], f"{row['ms']:.1f}{'*' * row['is_aside']}")
            cells.append((*known, *gains(row, rows), f"{row['error']:.1g}"))
    head = ["forward", "by", "GPUs", "shared", "how", "ms", "gain on one GPU", "on plain diffusers", "error"]
    lines += reports.table(head, cells)
    lines += ["", *(f"- {problem}" for problem in report["problems"])] if report["problems"] else []
    return "\n".join(lines) + "\n"


def degrees(rows: Sequence[Row]) -> list[Row]:
    """FLUX by size, requests and GPUs that share their tokens, as bench/degrees.py reads it; nothing is compiled."""
    found: dict[tuple[int, int, int], float] = {}
    for row in rows:
        is_elastic = row["layout"] in ("", "elastic", f"ulysses {row['gpus']}")
        if row["model"] == "flux" and row["by"] == "sgld" and is_elastic and "compiled" not in row["how"]:
            key = row["size"][0], row["rows"], row["gpus"]
            found[key] = min(row["ms"] / 1e3, found.get(key, math.inf))
    return [{"side": side, "rows": num, "degree": gpus, "seconds": s} for (side, num, gpus), s in sorted(found.items())]


def arguments() -> argparse.ArgumentParser:
    """What `Bench` is told on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--gpus", type=int, default=4, help="a power of two; on a CPU as many processes")
    parser.add_argument("--seconds", type=float, help="all in all; what is worth less is left out")
    parser.add_argument("--quiet-s", type=float, default=QUIET_S, help="ranks that say nothing for so long hang")
    parser.add_argument("--tiny", action="store_true", help="next to no layers, small sizes")
    parser.add_argument(
        "--ahead", action=argparse.BooleanOptionalAction, default=True, help="start processes in advance"
    )
    parser.add_argument("--out", type=Path)
    return parser


def main() -> None:
    """Measure all parts, or some, and print the table."""
    parser, codes = arguments(), ("sgld", "diffusers")
    parser.add_argument("--parts", nargs="+", default=[], help="words in names of parts, to measure only these")
    parser.add_argument("--by", nargs="+", choices=codes, default=codes, help="whose code is measured; sgld's on a CPU")
    args = parser.parse_args()
    is_gpu = args.device == "cuda"
    room = min((torch.cuda.get_device_properties(n).total_memory for n in range(args.gpus)), default=0) if is_gpu else 0
    by = args.by if is_gpu else ["sgld"]  # on a CPU diffusers shares nothing
    bench = Bench(args)
    bench.run(chosen(groups(args.gpus, has_room=room > _ROOM_FOR_THREE_BYTES), args.parts, by))
    print(bench.write())


if __name__ == "__main__":
    main()
