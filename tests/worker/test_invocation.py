"""What is asked of a component."""

import torch
from torch import nn

from sgld.worker.invocation import Invocation


class Coder(nn.Module):
    """Takes things out of what it is given, as models do."""

    def forward(self, x: torch.Tensor, kwargs: dict[str, float]) -> torch.Tensor:
        return x * kwargs.pop("scale")

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return x - 1


def test_component_runs_with_what_is_around_its_forward() -> None:
    coder, x = Coder(), torch.ones(2)
    coder.register_forward_hook(lambda _module, _args, output: output + 1)
    assert Invocation(coder, "forward", (x, {"scale": 3.0})).plain().tolist() == [4, 4]
    assert Invocation(coder, "decode", (x,)).plain().tolist() == [0, 0]


def test_arguments_change_and_all_else_stays() -> None:
    one = Invocation(Coder(), "decode", (torch.ones(2),), is_exact=True, fixed="a")
    other = one.having(((torch.zeros(3),), {}))
    assert (other.module, other.method, other.is_exact, other.fixed) == (one.module, "decode", True, "a")
    assert other.plain().tolist() == [-1, -1, -1]


def test_forms_differ_with_shapes_and_not_with_values() -> None:
    forms = {
        Invocation(Coder(), "forward", (torch.full((2, size), value),)).form for size in (1, 3) for value in (0, 1)
    }
    assert len(forms) == 2
