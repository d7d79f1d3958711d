"""What do the messages of ranks that share tokens cost, and what of that is hidden behind attention?

python bench/exchanges.py [--gpus 4] [--seconds 280] [--ways parted together] [--out bench/results/exchanges_4gpu]

Compiled forwards as in bench/parallel.py, of which ranks send their heads in several ways. Where nothing is written
(`silent`) results are wrong, and what is left is what ranks compute; they attend to zeros, with less power.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too

import forwards
from crews import Row, Teller
from forwards import Part, Work
from parallel import WAN, Bench, Group, arguments

from sgld.ipc.seats import Seat
from sgld.models import tokens
from sgld.models.exchange import Messages
from sgld.models.peer_memory import Room
from sgld.models.peers import Peers, exchange_of
from sgld.parallel import ParallelConfig

FLUX = tuple(Work("flux", (side,)) for side in (512, 1024, 1536))
EXPECTED_S = 75.0
ALONE = "one GPU"


def _as_they_are() -> None:
    """As the engine has it."""


def _replaced(exchange: Callable[..., Any]) -> Callable[[], None]:
    return lambda: vars(tokens).update(exchange_of=exchange)


def _parted(choose: Callable[[int], list[int]]) -> Callable[[], None]:
    def replace() -> None:
        for kind in (Peers, Messages):
            setattr(kind, "parts", lambda _self, num, *_: [size for size in choose(num) if size])  # noqa: B010 - of a class

    return replace


def _messages(group: Any, index: int, num: int) -> Messages:
    return Messages(group.group_name, index, num)


def _silent(*args: Any) -> Any:
    # What is tried at first comes there and back.
    exchange = exchange_of(*args)
    for room in [each for each in vars(exchange).values() if isinstance(each, Room)]:
        vars(room).update(write=lambda *_: None, meet=lambda *_: None)
    return exchange


WAYS: dict[str, Callable[[], None]] = {
    ALONE: _as_they_are,
    "parted": _as_they_are,
    "together": _parted(lambda num: [num]),
    "halves": _parted(lambda num: [num // 2, num - num // 2]),
    "one first": _parted(lambda num: [1, num - 1]),
    "one last": _parted(lambda num: [1, max(num - 2, 0), min(num - 1, 1)]),
    "by NCCL": _replaced(_messages),
    "silent": _replaced(_silent),
}


@dataclass
class Named(Teller):
    """Says of each row in which way messages were sent."""

    way: str

    def row(self, row: Row) -> None:
        super().row(row | {"layout": ", ".join(filter(None, (row["layout"], self.way)))})


def measure(seat: Seat, teller: Teller, part: Part, device: str, is_tiny: bool) -> None:
    """Entry of a rank."""
    way = part.name.partition(": ")[2]
    WAYS[way]()
    forwards.measure(seat, Named(teller.wire, way), part, device, is_tiny)


def groups(gpus: int, ways: list[str], models: list[str]) -> list[Group]:
    """Two ways compile beside one another: there is memory for two models on the first GPU."""
    works = {"flux": FLUX, "wan": (WAN,)}
    pairs = [ways[start : start + 2] for start in range(0, len(ways), 2)]
    return [
        tuple(
            Part(
                f"{model}: {way}", "sgld", works[model], EXPECTED_S,
                ParallelConfig(num_gpus=1 if way == ALONE else gpus), is_compiled=True,
            )
            for way in pair
        )
        for model in models
        for pair in pairs
    ]  # fmt: skip


def main() -> None:
    """Measure all ways, or some, and print the table."""
    parser = arguments()
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--models", nargs="+", choices=("flux", "wan"), default=["flux", "wan"])
    args = parser.parse_args()
    bench = Bench(args, measure)
    bench.run(groups(args.gpus, args.ways, args.models))
    print(bench.write())


if __name__ == "__main__":
    main()
