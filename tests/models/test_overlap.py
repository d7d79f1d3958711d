"""In which parts heads are exchanged."""

import heapq

import pytest

from sgld.models.exchange import Messages
from sgld.models.overlap import _attended, beside_one_another


def one_by_one(num: int, rows: int, num_tokens: int, num_ranks: int) -> list[int]:
    return Messages("ranks", 0, num_ranks).parts(num, rows, num_tokens)


@pytest.mark.parametrize(
    ("num", "num_tokens", "ranks", "wanted"),
    [
        (6, 9728, 4, [1, 5]), (6, 4608, 4, [3, 3]), (6, 1536, 4, [6]), (12, 4608, 2, [6, 6]), (12, 9728, 2, [6, 6]),
        (3, 32_760, 4, [1, 2]), (3, 10_920, 4, [3]), (1, 32_760, 12, [1]),
    ],
    ids=[
        "FLUX 1536²", "FLUX 1024²", "FLUX 512²", "FLUX 1024² on two", "FLUX 1536² on two",
        "Wan, 81 frames", "Wan, 25 frames", "one head",
    ],
)  # fmt: skip
def test_first_heads_are_as_few_as_cost_nothing(num: int, num_tokens: int, ranks: int, wanted: list[int]) -> None:
    assert one_by_one(num, 1, num_tokens, ranks) == wanted


def test_of_few_queries_all_heads_are_attended_to_together() -> None:
    assert all(one_by_one(num, 1, 64, 4) == [num] for num in range(1, 30))
    assert all(beside_one_another(num, 1, 64, 4, cost=220) == (num,) for num in range(1, 30))


def test_rows_of_fewer_tokens_send_more_in_the_time_of_a_wave() -> None:
    assert (one_by_one(6, 1, 3072, 4), one_by_one(6, 2, 1536, 4)) == ([1, 5], [3, 3])


@pytest.mark.parametrize(
    ("num", "num_tokens", "ranks", "wanted"),
    [
        (6, 9728, 4, (1, 4, 1)), (6, 4608, 4, (3, 3)), (6, 1536, 4, (6,)), (3, 32_760, 4, (1, 1, 1)),
        (1, 32_760, 12, (1,)), (4, 6400, 2, (2, 2)), (4, 9001, 2, (1, 2, 1)),
    ],
    ids=["FLUX 1536²", "FLUX 1024²", "FLUX 512²", "Wan, 81 frames", "one head", "two GPUs' test", "another one"],
)  # fmt: skip
def test_few_heads_are_waited_for_and_few_go_when_all_are_attended_to(
    num: int, num_tokens: int, ranks: int, wanted: tuple[int, ...]
) -> None:
    assert beside_one_another(num, 1, num_tokens, ranks, cost=220) == wanted


def test_parts_are_three_at_most_however_many_heads_there_are() -> None:
    parts = beside_one_another(48, 2, 120_000, 2, cost=220)
    assert (len(parts), sum(parts)) == (3, 48)


@pytest.mark.parametrize(
    ("first", "rest", "arrives", "wanted"),
    [(132, 132, 0, 2000), (66, 66, 500, 1500), (66, 67, 500, 2000), (66, 132, 0, 2000), (10, 132, 1700, 2700)],
    ids=["waves", "beside", "one more", "rest beside and after", "late"],
)
def test_tiles_that_come_later_are_attended_to_where_there_is_room(
    first: int, rest: int, arrives: int, wanted: int
) -> None:
    free = [(0, 132)]
    assert _attended(free, first, 0) == 1000
    assert _attended(free, rest, arrives) == wanted
    assert sum(num for _, num in free) == 132
    assert heapq.nsmallest(1, free) == free[:1]
