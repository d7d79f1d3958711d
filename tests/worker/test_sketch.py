"""Modules and arguments without their values."""

from typing import Any

import pytest
import torch
from pipelines import build
from torch import nn

from sgld.worker.sketch import CannotSketch, made, sketched


def remade(value: Any, *, shares: bool = False) -> Any:
    return made(sketched(value), shares=shares)


def geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    place = tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device
    return *place, tensor.requires_grad, type(tensor), tensor._is_view()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 3),
        torch.ones(2, 3).t(),
        torch.ones(4, 3, dtype=torch.bfloat16)[1:, 1:],
        torch.ones(2, 4, 3, 3).to(memory_format=torch.channels_last),
        torch.ones(1, 3).expand(2, 3),
        torch.ones(0, 3),
        torch.tensor(3),
        nn.Parameter(torch.ones(2)),
        nn.Parameter(torch.ones(2), requires_grad=False),
    ],
)
def test_tensor_keeps_all_but_its_values(tensor: torch.Tensor) -> None:
    assert geometry(remade(tensor)) == geometry(tensor)


def test_what_is_one_tensor_stays_one() -> None:
    one = torch.ones(2)
    first, second, third = remade((one, one, torch.ones(2)))
    assert first is second
    assert first is not third


def test_arguments_keep_their_form_and_constants() -> None:
    args, kwargs = remade(((torch.ones(1), None, 0.5), {"scale": 2, "list": [torch.ones(2)]}))
    assert args[1:] == (None, 0.5)
    assert (kwargs["scale"], len(kwargs["list"])) == (2, 1)


def test_model_keeps_its_processors_and_flags() -> None:
    pipeline, _ = build("flux")
    block = pipeline.transformer.transformer_blocks[0].eval()
    block.attn.processor._attention_backend = "flex"
    block.compile()
    other = remade(block)
    assert type(other) is type(block)
    assert other.attn.processor._attention_backend == "flex"
    assert other._compiled_call_impl is None
    assert not other.training
    names = {name: geometry(weight) for name, weight in block.named_parameters()}
    assert {name: geometry(weight) for name, weight in other.named_parameters()} == names


def test_layers_that_are_alike_have_equal_sketches() -> None:
    first, second = (nn.Linear(2, 3) for _ in range(2))
    assert sketched(first) == sketched(second) != sketched(nn.Linear(3, 3))


def test_weights_take_no_more_than_the_largest() -> None:
    layers = remade(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(4, 4)), shares=True)
    assert len({weight.untyped_storage().data_ptr() for weight in layers.parameters()}) == 1


@pytest.mark.parametrize("value", [lambda: None, torch.ones(2).to_sparse(), torch.nn.UninitializedParameter()])
def test_what_another_process_cannot_make_is_told(value: Any) -> None:
    module = nn.Identity()
    module.own = value
    with pytest.raises(CannotSketch):
        sketched(module)
