"""The process groups of a replica whose ranks run several forwards side by side: made once, at start."""

from typing import Any

import torch
import torch.distributed as dist

from sgld.parallel import Ranks


def subsets(num_ranks: int) -> list[Ranks]:
    """All blocks of two and more ranks, in one order for all ranks."""
    sizes = [2**n for n in range(1, num_ranks.bit_length())]
    return [Ranks(first, size) for size in sizes for first in range(0, num_ranks, size)]


def groups(num_ranks: int, device: torch.device) -> dict[Ranks, Any]:
    """A process group for each block, and all connections that will be needed; all ranks must call it.

    NCCL connects ranks when they first talk to each other, which takes up to a second and all of them.
    """
    made = {ranks: dist.new_group(list(ranks.every)) for ranks in subsets(num_ranks)}
    if device.type == "cuda":
        own = dist.get_rank()
        token = torch.zeros(1, device=device)
        for ranks, group in made.items():
            if own in ranks.every:
                dist.all_reduce(token, group=group)
        for other in range(1, num_ranks):
            if own == 0:
                dist.send(token, dst=other)
                dist.recv(token, src=other)
            elif own == other:
                dist.recv(token, src=0)
                dist.send(token, dst=0)
        torch.cuda.synchronize(device)
    return made
