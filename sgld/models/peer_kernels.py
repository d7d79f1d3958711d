"""What a GPU writes into the memory of others. Triton, which compiles it, comes with torch for GPUs only."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803 - as constants are named
import triton
import triton.language as tl

# Of what one program copies at a time, elements: 256 bytes of each row are together.
ROWS, COLUMNS = 256, 128
# Few, each of which takes most of a multiprocessor: attention that starts meanwhile finds others idle. A prime number,
# so that each program writes to all ranks in turn.
PROGRAMS, WARPS = 47, 32


# Else there would be several forms, compiled while all ranks wait, for what no address follows from.
@triton.jit(do_not_specialize=["num_tiles", "num_all"])
def put(
    first, second, third, plan, addresses, start, num_batch, source_batch, source_row, between, target_row, columns,
    num_ranks, rank, num_tiles, num_all, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy rows of up to three tensors that are alike to all ranks at the same time; each begins with the next one.

    On H200s, 340 GB/s to others.

    :param plan: for each rank the numbers of `peer_memory.Rows`.
    :param addresses: of the rooms of all ranks.
    :param start: where the first tensor goes in each of them; `between` it and the next one, in elements.
    :param num_tiles: of each batch of a tensor, for one rank; `num_all` there are.
    :param UNIT: all these numbers of elements are multiples of it.
    """
    across = tl.cdiv(columns, COLUMNS)
    for number in range(tl.program_id(0), num_all, tl.num_programs(0)):
        peer, of_peer = (number + rank + 1) % num_ranks, number // num_ranks
        tile, which = of_peer % num_tiles, of_peer // num_tiles
        tensor, batch = which // num_batch, (which % num_batch).to(tl.int64)
        entry = plan + 4 * peer
        num_rows = tl.load(entry)
        from_here = tl.multiple_of(tl.load(entry + 1), UNIT) + batch * source_batch
        to_there = tl.multiple_of(tl.load(entry + 2), UNIT) + batch * tl.multiple_of(tl.load(entry + 3), UNIT)
        source = first
        if tensor == 1:
            source = second
        if tensor == 2:
            source = third
        target = tl.multiple_of(tl.load(addresses + peer).to(first.dtype), 16)
        target += start + tensor.to(tl.int64) * between
        rows = (tile // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        mask = (rows < num_rows) & (inside < columns)
        values = tl.load(source + from_here + rows * source_row + inside, mask)
        tl.store(target + to_there + rows * target_row + inside, values, mask)
