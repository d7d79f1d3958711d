"""Processes that measure one part of a bench each: started ahead, let go in their turn, ended when they are late.

A rank says where it is, what it measured, and that it is done; at a gate it waits until it is let go. So the processes
of the next part import what takes long while another one is measured, and several can prepare beside one another.
"""

import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

from stuck import show_stacks

from sgld.ipc.seats import Seat, seats

Row = dict[str, Any]
_END_S = 5.0


class Ended(Exception):
    """Ranks failed, or were too late."""


@dataclass
class Teller:
    """A rank's end of its wire to the bench."""

    wire: Connection

    def row(self, row: Row) -> None:
        """Something was measured."""
        self.wire.send(("row", row))

    def gate(self, name: str) -> None:
        """Wait until this one may go on."""
        self.wire.send(("gate", name))
        self.wire.recv()


@dataclass
class Crew:
    """The ranks of one part.

    :ivar waiting: at which gate each waits.
    :ivar opened: gates that are open, for those that come later, too.
    :ivar done: ranks that are done, and leave.
    """

    name: str
    processes: Sequence[Any]
    wires: Sequence[Connection]
    folder: Any
    waiting: dict[int, str] = field(default_factory=dict)
    opened: set[str] = field(default_factory=set)
    done: set[int] = field(default_factory=set)

    def open(self, gate: str) -> None:
        """Let all go on that are there, or will be."""
        self.opened.add(gate)
        for index, at in list(self.waiting.items()):
            self._let_go(index, at)

    def _let_go(self, index: int, gate: str) -> None:
        if gate in self.opened:
            self.waiting.pop(index, None)
            self.wires[index].send("go")

    def rows(self, quiet_s: float, left_s: Callable[[], float], until: str | None = None) -> Iterator[Row]:
        """What the ranks measure, until the first of them comes to a gate, or is done.

        :param quiet_s: if nobody says anything for so long, they hang: they write their stacks.
        :param left_s: the seconds that there are for it.
        :raises Ended: a rank failed or died, they hang, or time is up.
        """
        heard_at = time.monotonic()
        while until is None or self.waiting.get(0) != until:
            timeout_s = min(heard_at + quiet_s - time.monotonic(), left_s())
            ready = wait([wire for n, wire in enumerate(self.wires) if n not in self.done], max(timeout_s, 0.0))
            if not ready and left_s() <= 0:
                raise Ended("time is up")
            if not ready:
                for process in self.processes:
                    show_stacks(process.pid)
                raise Ended(f"nothing was heard of it for {quiet_s:.0f} s; see the stacks")
            heard_at = time.monotonic()
            for wire in ready:
                index = self.wires.index(wire)
                try:
                    kind, said = self.wires[index].recv()
                except (EOFError, OSError):
                    raise Ended(f"rank {index} died") from None
                if kind == "row":
                    yield said
                elif kind == "gate":
                    self.waiting[index] = said
                    self._let_go(index, said)
                elif kind == "failed":
                    raise Ended(f"rank {index}: {said}")
                else:
                    self.done.add(index)
            if 0 in self.done:
                return

    def end(self) -> None:
        """All are gone; those that aren't done at once."""
        until = time.monotonic() + (_END_S if 0 in self.done else 0)
        for process in self.processes:
            process.join(max(until - time.monotonic(), 0))
            if process.exitcode is None:
                process.kill()
        for process in self.processes:
            process.join()
        for wire in self.wires:
            wire.close()
        self.folder.cleanup()


def start(context: Any, name: str, num_ranks: int, measure: Callable[..., None], args: tuple[Any, ...]) -> Crew:
    """The ranks of a part as processes.

    :param context: of multiprocessing.
    :param measure: called in each as `measure(seat, teller, *args)`.
    """
    folder = tempfile.TemporaryDirectory()
    processes, wires = [], []
    with seats(num_ranks, f"{folder.name}/store") as every:
        for seat in every:
            here, there = context.Pipe()
            process = context.Process(target=_rank, args=(seat, there, measure, args), name=f"{name} {seat.index}")
            process.start()
            there.close()
            processes.append(process)
            wires.append(here)
    return Crew(name, processes, wires, folder)


def _rank(seat: Seat, wire: Connection, measure: Callable[..., None], args: tuple[Any, ...]) -> None:
    """A rank; it leaves as those of the engine do, without taking down what it has of the GPU."""
    teller = Teller(wire)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        measure(seat, teller, *args)
        wire.send(("done", None))
    except Exception as error:  # noqa: BLE001 - whatever it is, the bench says it and goes on
        traceback.print_exc()
        wire.send(("failed", f"{type(error).__name__}: {error}"[:300]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _leave_with_parent() -> None:
    """A rank that waits for others in a forward hears of nothing else."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
