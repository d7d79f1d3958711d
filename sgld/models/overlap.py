"""In which parts heads are exchanged, so that some are attended to while others are on their way: pure functions."""

import functools
import heapq

# Measured on H200s; constants, as all ranks must part heads alike. One attends to so many tiles of 128 queries of one
# head at a time, in a wave: with 4,608 tokens 1, 2 and 3 heads take 64, 64 and 66 us, and 4, 5 and 6 take 123, 123 and
# 124.
TILE, TILES = 128, 132
WAVE = TILE * TILES
# A part that is launched by itself takes 5 us more: as a wave would with so many tokens.
_PART = 400


def one_by_one(num: int, rows: int, num_tokens: int, num_ranks: int, cost: int) -> list[int]:
    """How many of a rank's heads are attended to together, one part after the other: of one part, or of two.

    What comes first and goes last is waited for, and a head that comes (query, key and value) is thrice one that goes.
    Few heads first are waited for less, but others may be late, and a wave takes as long if it isn't full.

    :param num_ranks: that have heads.
    :param cost: thousandths of a wave that it takes to send a head of one row there and back, if all its tokens are
        others'; both are proportional to the number of tokens.
    """

    def waves(heads: int) -> int:
        return -(-heads * rows * num_tokens // WAVE)

    message = cost * num * rows * (num_ranks - 1) // num_ranks
    best, parts = 1000 * waves(num) + message, [num]
    # Where this is compiled there is a form for each way through it, so not all numbers are tried.
    for few in (1, num // 2) if num > 1 and waves(num) > 1 else ():
        waited = message * (num + 2 * few) // (4 * num)
        late = message * 3 * (num - few) // (4 * num) - 1000 * waves(few)
        taken = 1000 * (waves(few) + waves(num - few)) + waited + max(late, 0)
        if taken < best:
            best, parts = taken, [few, num - few]
    return parts


@functools.lru_cache(maxsize=4096)
def beside_one_another(num: int, rows: int, num_tokens: int, num_ranks: int, cost: int) -> tuple[int, ...]:
    """The same where each part comes, is attended to and goes beside those before it: of one to three parts."""
    tiles = rows * -(-num_tokens // TILE)
    if num * tiles <= TILES:
        return (num,)
    message, part = cost * rows * (num_ranks - 1) // num_ranks, 1000 * _PART // num_tokens
    # What is waited for is never much.
    few = max(3 * TILES // tiles, 1)
    in_two = [(first, num - first) for first in range(1, min(few + 1, num))]
    in_three = [(first, rest - last, last) for first, rest in in_two for last in range(1, min(few + 1, rest))]
    return min([(num,), *in_two, *in_three], key=lambda parts: _taken(parts, tiles, message) + len(parts) * part)


def _taken(parts: tuple[int, ...], tiles: int, message: int) -> int:
    """Thousandths of a wave until all parts have gone.

    :param tiles: of a head.
    :param message: what it takes to send one there and back.
    """
    arrived, gone, free = 0, 0, [(0, TILES)]
    for part in parts:
        # Where those before it fill all there is, it is written after that.
        arrived = max(arrived, free[0][0]) + message * 3 * part // 4
        gone = max(gone, _attended(free, part * tiles, arrived)) + message * part // 4
    return gone


def _attended(free: list[tuple[int, int]], tiles: int, arrived: int) -> int:
    """When so many tiles are attended to that are there from `arrived` on.

    :param free: when how many can be attended to, a heap; afterwards, when others can.
    """
    end = 0
    while tiles > 0:
        at, num = heapq.heappop(free)
        taken, start = min(num, tiles), max(at, arrived)
        heapq.heappush(free, (start + 1000, taken))
        if taken < num:
            heapq.heappush(free, (at, num - taken))
        tiles, end = tiles - taken, max(end, start + 1000)
    return end
