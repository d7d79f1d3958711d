"""What ranks send one another of their tensors. Compiled code, too, goes on computing while messages are under way."""

from typing import Any

import torch
import torch.distributed as dist

# Its name since torch 2.13, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def sent_to_all(parts: torch.Tensor, received: list[int], given: list[int], group: str) -> torch.Tensor:
    """Send each rank its part along the first axis: what comes of theirs, once it has `arrived`.

    :param received: how long the parts are that others send.
    :param given: how long those are that they get.
    :param group: the name of theirs, by which compiled code knows it.
    """
    return torch.ops._c10d_functional.all_to_all_single(parts, received, given, group)  # type: ignore[no-any-return]


def arrived(message: torch.Tensor) -> torch.Tensor:
    """What was under way; the device waits for it, and the host doesn't."""
    return torch.ops._c10d_functional.wait_tensor(message)  # type: ignore[no-any-return]


def gathered(part: torch.Tensor, dim: int, lengths: list[int], group: Any) -> torch.Tensor:
    """Parts of these lengths along `dim`, joined."""
    longest = max(lengths)
    sent = part.movedim(dim, 0).contiguous()
    if sent.shape[0] < longest:
        sent = torch.cat([sent, sent.new_zeros((longest - sent.shape[0], *sent.shape[1:]))])
    result = sent.new_empty((longest * len(lengths), *sent.shape[1:]))
    _all_gather(result, sent, group=group)
    if min(lengths) < longest:
        parts = torch.split(result, longest)
        result = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
    return result.movedim(0, dim)


def gathered_sizes(num: int, num_ranks: int, group: Any) -> list[int]:
    """What number each rank has."""
    # By gloo where there is one, so that no GPU has to be waited for.
    device = "cpu" if "cpu" in str(dist.get_backend_config(group)) else "cuda"
    own = torch.tensor([num], device=device)
    sizes = [torch.empty_like(own) for _ in range(num_ranks)]
    dist.all_gather(sizes, own, group=group)
    return [int(size) for size in sizes]
