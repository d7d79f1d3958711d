import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from crews import Crew, Ended, Row, Teller, start

from sgld.ipc.seats import Seat


def speaks(seat: Seat, teller: Teller) -> None:
    teller.gate("ready")
    if seat.index == 0:
        teller.row({"rank": 0})


def hangs(_seat: Seat, teller: Teller) -> None:
    teller.gate("ready")
    threading.Event().wait()


def dies(seat: Seat, teller: Teller) -> None:
    if seat.index:
        os._exit(1)
    teller.gate("ready")


def raises(_seat: Seat, _teller: Teller) -> None:
    raise ValueError("no such size")


@contextmanager
def crew_of(measure: Any, num_ranks: int = 1) -> Iterator[Crew]:
    crew = start(multiprocessing.get_context("spawn"), "a part", num_ranks, measure, ())
    try:
        yield crew
    finally:
        crew.end()
        assert all(process.exitcode is not None for process in crew.processes)


def heard(crew: Crew, *, quiet_s: float = 60.0, left_s: float = 60.0, until: str | None = None) -> list[Row]:
    with closing(crew.rows(quiet_s, lambda: left_s, until)) as rows:  # type: ignore[type-var]
        return list(rows)


def test_ranks_prepare_until_they_are_let_go_and_then_say_what_they_measured() -> None:
    with crew_of(speaks, num_ranks=2) as crew:
        assert heard(crew, until="ready") == []
        crew.open("ready")
        assert heard(crew) == [{"rank": 0}]


def test_ranks_that_say_nothing_any_more_write_their_stacks(capfd: pytest.CaptureFixture[str]) -> None:
    with crew_of(hangs) as crew:
        heard(crew, until="ready")
        with pytest.raises(Ended, match="time is up"):
            heard(crew, left_s=0.0)
        with pytest.raises(Ended, match="nothing was heard of it for 0 s"):
            heard(crew, quiet_s=0.0)
    assert "crews.py" in capfd.readouterr().err


def test_a_rank_that_dies_ends_the_part_and_one_that_fails_says_why() -> None:
    with crew_of(dies, num_ranks=2) as crew, pytest.raises(Ended, match="rank 1 died"):
        heard(crew)
    with crew_of(raises) as crew, pytest.raises(Ended, match="rank 0: ValueError: no such size"):
        heard(crew)
