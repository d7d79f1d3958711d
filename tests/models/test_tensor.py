"""Which layers ranks have parts of."""

from typing import Any

import diffusers
import pytest
import torch
import transformers
from accelerate import init_empty_weights
from pipelines.flux import SIZES as FLUX_SIZES

from sgld.models.tensor import Indivisible, NoPlan, divide_model
from sgld.models.tensor_layers import Cut, SplitLinear, SummedEmbedding, SummedLinear, Team


def t5() -> Any:
    config = transformers.T5Config(vocab_size=10, d_model=8, num_layers=1, d_kv=4, num_heads=6)
    with init_empty_weights():
        return transformers.T5EncoderModel(config)


def test_layers_are_divided_as_the_plan_has_it() -> None:
    model = t5()
    cuts = divide_model(model, Team(1, 3))
    attention = model.get_submodule("encoder.block.0.layer.0.SelfAttention")
    assert type(attention.q) is SplitLinear
    assert type(attention.o) is SummedLinear
    assert type(model.shared) is SummedEmbedding
    assert attention.q.weight.shape == (8, 8)
    assert attention.o.weight.shape == (8, 8)
    assert attention.relative_attention_bias.weight.shape == (32, 2)
    assert attention.n_heads == 2
    assert cuts["encoder.block.0.layer.0.SelfAttention.o.weight"] == Cut(1, (24,))
    # Of 10 tokens, 3, 3 and 4.
    assert model.shared.weight.shape == (3, 8)


def test_number_of_heads_that_is_no_multiple_is_told() -> None:
    with pytest.raises(Indivisible, match="it has 6 attention heads, and 6 isn't a multiple of 4"):
        divide_model(t5(), Team(0, 4))


def test_blocks_of_one_layer_are_divided_each_by_itself() -> None:
    with init_empty_weights():
        model = diffusers.FluxTransformer2DModel(in_channels=4, out_channels=4, **FLUX_SIZES)
    cuts = divide_model(model, Team(0, 2))
    assert cuts["single_transformer_blocks.0.proj_out.weight"] == Cut(1, (32, 128))
    assert "single_transformer_blocks.0.proj_out.bias" not in cuts
    assert cuts["single_transformer_blocks.0.proj_mlp.bias"] == Cut(0, (128,))


def test_parts_of_blocks_lie_beside_one_another() -> None:
    whole = torch.arange(10).expand(2, 10)
    assert Cut(1, (4, 6)).part(whole, 1, 2).tolist() == [[2, 3, 7, 8, 9]] * 2
    assert [Cut(0, (5,)).places(index, 2) for index in range(2)] == [[slice(0, 2)], [slice(2, 5)]]


def test_of_a_file_only_the_parts_are_asked_for() -> None:
    asked = []

    class File:
        def __getitem__(self, index: Any) -> torch.Tensor:
            asked.append(index)
            return torch.zeros(3, 2)

    Cut(0, (6,)).part(File(), 1, 2)
    Cut(1, (4, 8)).part(File(), 0, 2)
    everything = slice(None)
    assert asked == [(slice(3, 6),), (everything, slice(0, 2)), (everything, slice(4, 8))]


def test_model_of_which_nobody_knows_how_is_left_alone() -> None:
    with init_empty_weights():
        model = diffusers.SD3Transformer2DModel(num_layers=1, num_attention_heads=2, caption_projection_dim=16)
    before = [type(module) for module in model.modules()]
    with pytest.raises(NoPlan, match="nothing says how its layers are divided"):
        divide_model(model, Team(0, 2))
    assert [type(module) for module in model.modules()] == before
