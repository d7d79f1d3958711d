"""Which tokens a rank has; tests/models/test_sequence.py has what it does with them."""

from itertools import pairwise

import pytest
import torch

from sgld.models.tokens import TokenRanks, Tokens, UnevenTokens


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
