"""What the kernel does that writes into rooms, on a machine without GPUs."""

import itertools

import torch

from sgld.models.peer_memory import Rows


def write_rows(source: torch.Tensor, target: torch.Tensor, rows: Rows, columns: int, row: int) -> None:
    """Row by row, what one rank gets.

    :param target: its room, flat.
    """
    for batch, index in itertools.product(range(source.shape[0]), range(rows.num)):
        start = rows.source + batch * source.stride(0) + index * source.stride(1) + source.storage_offset()
        place = rows.target + batch * rows.batch + index * row
        target[place : place + columns] = torch.as_strided(source, (columns,), (1,), start)
