"""Forwards side by side."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from sgld.errors import PipelineFailed
from sgld.outcome import Value
from sgld.parallel import Ranks
from sgld.worker.calls import Call
from sgld.worker.elastic import Away
from sgld.worker.executor import Executor
from sgld.worker.invocation import Invocation
from sgld.worker.lanes import Lane, Lanes
from sgld.worker.orders import FollowerFailed
from worker.requests import Function, call_of

OTHERS = Ranks(2, 2)


class FakeLeader:
    """Has other ranks run what they can't, and runs the rest."""

    def __init__(self) -> None:
        self.refused: list[str] = []

    def max_degree(self, invocation: Invocation) -> int:
        return 4

    def on(self, ranks: Ranks) -> AbstractContextManager[None]:
        return nullcontext()

    def refuse(self, invocation: Invocation, problem: str) -> None:
        self.refused.append(problem)

    def result(self, away: Away) -> Any:
        assert isinstance(away.reply, FollowerFailed)
        raise PipelineFailed(away.reply.message)


def lanes_of(leader: Any) -> Lanes:
    return Lanes(Executor(), leader, torch.device("cpu"))


def test_what_a_task_draws_from_is_drawn_from_on_rank_0() -> None:
    lanes, model = lanes_of(FakeLeader()), Function(lambda x, generator=None: x)
    assert lanes.degree(call_of(model, torch.ones(1))) == (4, False)
    assert lanes.degree(call_of(model, torch.ones(1), generator=torch.Generator())) == (4, True)


def any_call(_call: Call) -> bool:
    return True


def fails(_x: torch.Tensor) -> torch.Tensor:
    raise ValueError("the request's own")


@pytest.mark.parametrize(("function", "refused"), [(lambda x: x, ["not in two"]), (fails, [])])
def test_only_what_one_rank_can_run_is_what_several_cannot_share(function: Any, refused: list[str]) -> None:
    leader: Any = FakeLeader()
    call = call_of(Function(function), torch.ones(1))
    lanes = lanes_of(leader)
    away = Away(leader, OTHERS, FollowerFailed(1, "not in two"))
    lanes._sent = lambda calls, ranks: Lane(ranks, calls, away)  # type: ignore[method-assign]
    lanes.begin([call], OTHERS)
    [(lane, tick)] = lanes.over(any_call)
    assert tick is not None
    assert (lane.ranks, tick.is_timed, len(lanes)) == (OTHERS, False, 0)
    assert isinstance(tick.outcomes[0], Value) == bool(refused)
    assert leader.refused == refused


def test_time_on_rank_0_says_nothing_of_the_ranks_that_it_was_meant_for() -> None:
    lanes, call = lanes_of(FakeLeader()), call_of(Function(lambda x: x), torch.ones(1))
    lanes._sent = lambda calls, ranks: None  # type: ignore[method-assign]
    lanes.begin([call], OTHERS)
    lanes.begin([call], Ranks(0, 1))
    over = list(lanes.over(any_call))
    assert [(lane.ranks.first, tick is not None and tick.is_timed) for lane, tick in over] == [(2, False), (0, True)]


def test_what_failed_elsewhere_waits_again_where_it_may_not_run_now() -> None:
    leader: Any = FakeLeader()
    num_runs: list[None] = []
    call = call_of(Function(num_runs.append), None)
    lanes = lanes_of(leader)
    away = Away(leader, OTHERS, FollowerFailed(1, "not in two"))
    lanes._sent = lambda calls, ranks: Lane(ranks, calls, away)  # type: ignore[method-assign]
    lanes.begin([call], OTHERS)
    assert [(lane.ranks, tick) for lane, tick in lanes.over(lambda call: False)] == [(OTHERS, None)]
    assert (num_runs, leader.refused, len(lanes)) == ([], [], 0)
