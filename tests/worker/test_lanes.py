"""Forwards side by side."""

from types import SimpleNamespace
from typing import Any

import torch

from sgld.worker.executor import Executor
from sgld.worker.lanes import Lanes
from worker.requests import Function, call_of


def test_what_a_task_draws_from_is_drawn_from_on_rank_0() -> None:
    leader: Any = SimpleNamespace(max_degree=lambda invocation: 4)
    lanes, model = Lanes(Executor(), leader, torch.device("cpu")), Function(lambda x, generator=None: x)
    assert lanes.degree(call_of(model, torch.ones(1))) == (4, False)
    assert lanes.degree(call_of(model, torch.ones(1), generator=torch.Generator())) == (4, True)
