"""How many heads come first."""

import pytest

from sgld.models.exchange import Messages
from sgld.models.overlap import _attended, first_heads_beside


def first_heads(num: int, rows: int, num_tokens: int, num_ranks: int) -> int:
    return Messages("ranks", 0, num_ranks).first_heads(num, rows, num_tokens)


@pytest.mark.parametrize(
    ("num", "num_tokens", "ranks", "wanted"),
    [
        (6, 9728, 4, 1), (6, 4608, 4, 3), (6, 1536, 4, 0), (12, 4608, 2, 6), (12, 9728, 2, 6),
        (3, 32_760, 4, 1), (3, 10_920, 4, 0), (1, 32_760, 12, 0),
    ],
    ids=[
        "FLUX 1536²", "FLUX 1024²", "FLUX 512²", "FLUX 1024² on two", "FLUX 1536² on two",
        "Wan, 81 frames", "Wan, 25 frames", "one head",
    ],
)  # fmt: skip
def test_first_heads_are_as_few_as_cost_nothing(num: int, num_tokens: int, ranks: int, wanted: int) -> None:
    assert first_heads(num, 1, num_tokens, ranks) == wanted


def test_of_few_queries_all_heads_are_attended_to_together() -> None:
    assert all(first_heads(num, 1, 64, 4) == 0 for num in range(1, 30))


def test_rows_of_fewer_tokens_send_more_in_the_time_of_a_wave() -> None:
    assert (first_heads(6, 1, 3072, 4), first_heads(6, 2, 1536, 4)) == (1, 3)


@pytest.mark.parametrize(
    ("num", "num_tokens", "ranks", "wanted"),
    [(6, 9728, 4, 1), (6, 4608, 4, 3), (6, 1536, 4, 0), (3, 32_760, 4, 1), (1, 32_760, 12, 0)],
    ids=["FLUX 1536²", "FLUX 1024²", "FLUX 512²", "Wan, 81 frames", "one head"],
)
def test_first_heads_leave_room_for_others_beside_them(num: int, num_tokens: int, ranks: int, wanted: int) -> None:
    assert first_heads_beside(num, 1, num_tokens, ranks, cost=220) == wanted


@pytest.mark.parametrize(
    ("first", "rest", "arrives", "wanted"),
    [(132, 132, 0, 2000), (66, 66, 500, 1500), (66, 67, 500, 2000), (66, 132, 0, 2000), (10, 132, 1700, 2700)],
    ids=["waves", "beside", "one more", "rest beside and after", "late"],
)
def test_tiles_that_come_later_are_attended_to_where_there_is_room(
    first: int, rest: int, arrives: int, wanted: int
) -> None:
    assert _attended(first, rest, arrives) == wanted
