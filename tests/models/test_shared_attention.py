"""Kernels of attention and ranks; tests/models/test_sequence.py has what they compute."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sgld.errors import ModelError
from sgld.models.shared_attention import check_attention, shared_attention


def test_kernel_that_cannot_share_tokens_is_refused_by_name() -> None:
    model: Any = torch.nn.Identity()
    model.processor = SimpleNamespace(_attention_backend="native")
    check_attention(model)
    model.processor = SimpleNamespace(_attention_backend="flex")
    with pytest.raises(ModelError, match=r"flex can't share tokens between GPUs; use one of .*native"):
        check_attention(model)


def test_causal_attention_is_refused() -> None:
    one: Any = torch.zeros(1, 2, 2, 8)
    with pytest.raises(ValueError, match="attention that is causal"):
        shared_attention(one, one, one, is_causal=True, forward_op=None, _parallel_config=one)
