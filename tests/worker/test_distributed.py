from multiprocessing import Pipe
from typing import Any

import pytest

from sgld.config import EngineConfig
from sgld.ipc.seats import Seat
from sgld.worker.distributed import fail, follow, lead
from sgld.worker.orders import WireGone, receive, send


def test_follower_whose_rank_0_could_not_load_the_model_leaves_without_a_word() -> None:
    gone, wire = Pipe()
    gone.close()
    seat, model = Seat(1, 2, "", (wire,)), Any
    fail(seat, "there is no such model")
    follow(seat, model, EngineConfig())  # type: ignore[arg-type]


def test_wire_to_a_process_that_is_gone_says_so() -> None:
    """Whoever works on something then leaves without a traceback, and what a model raises is told apart from it."""
    gone, wire = Pipe()
    gone.close()
    with pytest.raises(WireGone):
        receive(wire)
    with pytest.raises(WireGone):
        send(wire, "a message")


def test_follower_that_dies_while_it_loads_is_no_fault_of_the_model() -> None:
    """The front loads again, as where rank 0 dies."""
    wire, gone = Pipe()
    gone.close()
    model: Any = None
    with pytest.raises(SystemExit, match="rank 1 died while it loaded the model"):
        lead(Seat(0, 2, "", (wire,)), model, EngineConfig(), lambda name, note: None)
