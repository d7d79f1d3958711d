"""Tokens on several ranks, as far as one process shows it; tests/engine/test_ranks.py has the rest."""

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch.nn import functional

from sgld.errors import ModelError
from sgld.models.sequence import attention_with_lse, check_attention, plan_of


def test_models_of_diffusers_say_how_they_split_tokens() -> None:
    assert plan_of(diffusers.FluxTransformer2DModel)
    assert plan_of(diffusers.WanTransformer3DModel)
    assert plan_of(diffusers.UNet2DConditionModel) is None


def test_kernel_that_cannot_share_tokens_is_refused_by_name() -> None:
    model: Any = torch.nn.Identity()
    model.processor = SimpleNamespace(_attention_backend="native")
    check_attention(model)
    model.processor = SimpleNamespace(_attention_backend="flex")
    with pytest.raises(ModelError, match=r"flex can't share tokens between GPUs; use one of .*native"):
        check_attention(model)


def test_parts_of_keys_make_the_attention_of_all() -> None:
    """What a ring does: each part with the logarithm of its denominators."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 6, 2, 8) for _ in range(3))
    parts = [
        attention_with_lse(None, query, key[:, half], value[:, half], return_lse=True)
        for half in (slice(4), slice(4, 6))
    ]
    weights = torch.softmax(torch.stack([lse for _, lse in parts]), dim=0)
    whole = sum(weight[..., None] * out for weight, (out, _) in zip(weights, parts, strict=True))
    heads_first = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    expected = functional.scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2]).transpose(1, 2)
    torch.testing.assert_close(whole, expected)


def test_mask_for_all_heads_serves_those_of_a_rank() -> None:
    query, key, value = (torch.randn(1, 6, 2, 8) for _ in range(3))
    mask = torch.zeros(1, 4, 1, 6)
    torch.testing.assert_close(
        attention_with_lse(None, query, key, value, mask), attention_with_lse(None, query, key, value)
    )
