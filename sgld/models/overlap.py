"""How many heads are attended to first, while others are on their way: pure functions."""

import functools

# Measured on H200s; constants, as all ranks must part heads alike. One attends to so many tiles of 128 queries of one
# head at a time, in a wave: with 4,608 tokens 1, 2 and 3 heads take 64, 64 and 66 us, and 4, 5 and 6 take 123, 123 and
# 124.
TILE, TILES = 128, 132
WAVE = TILE * TILES


def first_heads(num: int, rows: int, num_tokens: int, num_ranks: int, cost: int) -> int:
    """Of a rank's heads so many are attended to first, while the others come; 0: all of them together.

    What comes first and goes last is waited for, and a head that comes (query, key and value) is thrice one that goes.
    Few heads first are waited for less, but others may be late, and a wave takes as long if it isn't full.

    :param num_ranks: that have heads.
    :param cost: thousandths of a wave that it takes to send a head of one row there and back, if all its tokens are
        others'; both are proportional to the number of tokens.
    """

    def waves(heads: int) -> int:
        return -(-heads * rows * num_tokens // WAVE)

    message = cost * num * rows * (num_ranks - 1) // num_ranks
    best, first = 1000 * waves(num) + message, 0
    # Where this is compiled there is a form for each way through it, so not all numbers are tried.
    for few in (1, num // 2) if num > 1 and waves(num) > 1 else ():
        waited = message * (num + 2 * few) // (4 * num)
        late = message * 3 * (num - few) // (4 * num) - 1000 * waves(few)
        taken = 1000 * (waves(few) + waves(num - few)) + waited + max(late, 0)
        if taken < best:
            best, first = taken, few
    return first


@functools.lru_cache(maxsize=4096)
def first_heads_beside(num: int, rows: int, num_tokens: int, num_ranks: int, cost: int) -> int:
    """The same where the others are attended to as soon as they have come, beside the first ones."""
    tiles = rows * -(-num_tokens // TILE)
    message = cost * num * rows * (num_ranks - 1) // num_ranks
    best, first = 1000 * -(-num * tiles // TILES) + message, 0
    for few in range(1, num) if num * tiles > TILES else ():
        waited = message * (num + 2 * few) // (4 * num)
        # Where the first ones fill all there is, the others are written after that.
        arrives = 1000 * (few * tiles // TILES) + message * 3 * (num - few) // (4 * num)
        taken = waited + _attended(few * tiles, (num - few) * tiles, arrives)
        if taken < best:
            best, first = taken, few
    return first


def _attended(first: int, rest: int, arrives: int) -> int:
    """When all tiles are attended to of which the rest arrives then, in thousandths of a wave."""
    waves, more = divmod(first, TILES)
    # Those that have one more of the first tiles are free a wave later.
    free = [(TILES - more, max(1000 * waves, arrives)), (more, max(1000 * (waves + 1), arrives))]
    ends = sorted(at + 1000 * num for _, at in free for num in range(1, -(-rest // TILES) + 2))
    return next(end for end in ends if sum(num * max((end - at) // 1000, 0) for num, at in free) >= rest)
