"""What tasks and models draw without a generator of their own."""

from typing import Any

import torch
from torch import nn

from sgld.outcome import Value
from sgld.worker.executor import single
from sgld.worker.randomness import OwnRandom
from sgld.worker.task import Task
from worker.requests import call_of


class Noisy(nn.Module):
    """Adds noise inside its forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn(x.shape)


def drawing(task: Task) -> list[Any]:
    """Draws itself and in a component, in turn."""
    drawn = []
    for _ in range(3):
        drawn.append(torch.rand(1).item())
        drawn.append(task.hand_over(call_of(Noisy(), torch.zeros(1, 1))).item())
    return drawn


def run_in_turns(*tasks: Task) -> list[Any]:
    for task in tasks:
        task.advance()
    while waiting := [task for task in tasks if task.call is not None]:
        for task in waiting:
            assert task.call is not None
            task.advance(single(task.call))
    ends = [task.end for task in tasks]
    assert all(isinstance(end, Value) for end in ends)
    return [end.value for end in ends if isinstance(end, Value)]


def test_a_task_draws_the_same_in_company_as_alone() -> None:
    (alone,) = run_in_turns(Task("a", drawing, seed=3))
    _, in_company, other = run_in_turns(*(Task(str(seed), drawing, seed=seed) for seed in (1, 3, 4)))
    assert in_company == alone
    assert other != alone
    assert len(set(alone)) == 6


def test_others_draw_as_if_the_task_had_not() -> None:
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    first = torch.rand(1)
    run_in_turns(Task("a", drawing))
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)


def test_blocks_that_draw_are_counted() -> None:
    own = OwnRandom()
    with own.entered():
        pass
    assert own.num_draws == 0
    for _ in range(2):
        with own.entered():
            torch.rand(1)
    assert own.num_draws == 2
