"""Which tokens a rank has; tests/models/test_sequence.py has what it does with them."""

import re
import shutil
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from sgld.models.placement import compile_module
from sgld.models.tokens import TokenRanks, Tokens, UnevenTokens

pytestmark = pytest.mark.long


def tokens_of(index: int, num: int) -> Tokens:
    return Tokens("Model", TokenRanks(None, None, None, 1, num, index))


@pytest.mark.parametrize(("num", "ranks"), [(9, 2), (8, 4), (7, 4), (4, 4)])
def test_parts_that_may_differ_are_those_of_torch(num: int, ranks: int) -> None:
    whole = torch.arange(num)
    for index, part in enumerate(whole.tensor_split(ranks)):
        tokens = tokens_of(index, ranks)
        tokens.begin([], is_uneven=True)
        assert torch.equal(tokens.part(whole, 0), part)


def test_equal_parts_follow_one_another() -> None:
    bounds = [tokens_of(index, 3).bounds(9) for index in range(3)]
    assert all(one[1] == other[0] for one, other in pairwise(bounds))
    assert (bounds[0][0], bounds[-1][1]) == (0, 9)


def test_lengths_that_are_no_multiple_are_told_apart_from_too_few() -> None:
    with pytest.raises(UnevenTokens):
        tokens_of(0, 2).part(torch.zeros(1, 3), 1)
    with pytest.raises(ValueError, match="Model has a sequence of 1 tokens, which sp_degree 2 can't share"):
        tokens_of(0, 2).part(torch.zeros(3, 1), 1)


def test_lengths_that_are_known_are_told_in_the_order_in_which_they_are_asked_for() -> None:
    tokens = tokens_of(0, 2)
    tokens.begin([[5, 4], [2, 1]], is_uneven=True)
    assert (tokens.lengths(5), tokens.lengths(2)) == ([5, 4], [2, 1])
    tokens.begin([], is_uneven=False)
    assert tokens.lengths(3) == [3, 3]


def test_a_forward_that_is_made_once_more_asks_for_the_same() -> None:
    tokens = tokens_of(0, 2)
    tokens.begin([[2, 1], [4, 3]], is_uneven=True)
    for _ in range(2):
        assert (tokens.lengths(2), tokens.lengths(4)) == ([2, 1], [4, 3])
        tokens.again()


def test_a_rank_alone_has_all_and_asks_nobody() -> None:
    tokens, rows = Tokens("Model", TokenRanks.alone()), torch.rand(1, 2, 3, 4)
    assert torch.equal(tokens.part(rows, 2), rows)
    assert torch.equal(tokens.whole(rows, 2), rows)
    around = tokens.with_neighbours(rows)
    assert torch.equal(around[:, :, 1:-1], rows)
    assert not around[:, :, 0].any()


class Attending(nn.Module):
    """Attention of this rank's tokens among those of all, or to other ones."""

    def __init__(self, tokens: Tokens) -> None:
        super().__init__()
        self._tokens = tokens

    def forward(self, x: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
        others = x if others is None else others
        return self._tokens.attention(2 * x, others, others, None, attend)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: torch.Tensor | None) -> torch.Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def compiled_code(module: nn.Module, *args: Any) -> str:
    """What torch makes of a module."""
    from torch._inductor.utils import run_and_get_code

    compile_module(module, in_order=True)
    with torch.no_grad():
        _, code = run_and_get_code(module, *args)
    return "".join(code)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++, which isn't here")
def test_heads_come_and_go_while_others_are_attended_to_in_compiled_code(one_of_four: TokenRanks) -> None:
    code = compiled_code(Attending(Tokens("Model", one_of_four)), torch.randn(1, 3000, 8, 8))
    steps = re.findall(r"= torch\.ops\.\w+\.(all_to_all|_scaled_dot)|(wait_tensor)\.default\(", code)
    sends, attends, waits = ("all_to_all", ""), ("_scaled_dot", ""), ("", "wait_tensor")
    assert steps == [sends, sends, waits, attends, sends, waits, attends, sends, waits, waits]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++, which isn't here")
def test_compiled_code_knows_attention_to_the_same_tokens_after_one_to_others(
    one_of_four: TokenRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, sends = Tokens("Model", one_of_four), torch.ops._c10d_functional.all_to_all_single
    own, others = [3000, 3000, 3000, 2999], [8, 8, 8, 7]
    module, x, y = Attending(tokens), torch.randn(1, 3000, 8, 8), torch.randn(1, 8, 8, 8)
    compile_module(module)
    sent: list[None] = []
    send = sends.default

    def count(*args: Any) -> torch.Tensor:
        sent.append(None)
        return send(*args)  # type: ignore[no-any-return]

    with torch.no_grad():
        for given, lengths in (((x,), own), ((x, y), others)):
            tokens.begin([own, lengths], is_uneven=True)
            module(*given)
        monkeypatch.setattr(sends, "default", count)
        tokens.begin([own, own], is_uneven=True)
        module(x)
    assert len(sent) == 4
