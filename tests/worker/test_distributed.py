from multiprocessing import Pipe
from typing import Any

from sgld.config import EngineConfig
from sgld.ipc.seats import Seat
from sgld.worker.distributed import fail, follow


def test_follower_whose_rank_0_could_not_load_the_model_leaves_without_a_word() -> None:
    gone, wire = Pipe()
    gone.close()
    seat, model = Seat(1, 2, "", (wire,)), Any
    fail(seat, "there is no such model")
    follow(seat, model, EngineConfig())  # type: ignore[arg-type]
