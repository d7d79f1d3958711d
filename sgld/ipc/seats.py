"""The seats of the ranks of one replica: who is connected to whom, before any of them has loaded anything."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection


@dataclass(frozen=True)
class Seat:
    """One rank among those of its replica.

    :ivar meeting: a file of the front, by which the ranks find each other; empty where there is only one.
    :ivar wires: of rank 0: to each follower, in their order; of a follower: the one to rank 0.
    """

    index: int = 0
    num_ranks: int = 1
    meeting: str = ""
    wires: tuple[Connection, ...] = ()


ALONE = Seat()
"""That of the only rank."""


@contextmanager
def seats(num_ranks: int, meeting: str) -> Iterator[tuple[Seat, ...]]:
    """A seat for each rank, to be handed over when its process is spawned; this process keeps no end of the wires.

    A wire ends with the process at its other end, however that ends: so each hears of the death of the other.
    """
    if num_ranks == 1:
        yield (ALONE,)
        return
    with ExitStack() as stack:
        pairs = [Pipe() for _ in range(num_ranks - 1)]
        for end in (end for pair in pairs for end in pair):
            stack.callback(end.close)
        leader = Seat(0, num_ranks, meeting, tuple(one for one, _ in pairs))
        yield (leader, *(Seat(n, num_ranks, meeting, (other,)) for n, (_, other) in enumerate(pairs, 1)))
