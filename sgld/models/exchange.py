"""What ranks send one another of their tensors. Compiled code, too, goes on computing while messages are under way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist

from sgld.models.overlap import one_by_one

# Its name since torch 2.13, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
Shared = tuple[Sequence[torch.Tensor], list[int]]
"""Tensors (B, S, H, D) that are parts of the tokens of all ranks, which have so many of them."""


class Arriving(Protocol):
    """Some heads of the tokens of all ranks; all ranks ask for all parts, in their order."""

    def answered(self, answer: Callable[[Sequence[torch.Tensor]], Any]) -> Any:
        """What `answer` makes of the tensors (B, S, H, D), which are read before results are joined, and not later."""
        ...


class HeadExchange(Protocol):
    """Ranks that have parts of the tokens, and exchange heads so that each has some of them for all tokens.

    Heads come and go in parts: some are attended to while others are on their way.
    """

    def parts(self, num: int, rows: int, num_tokens: int) -> Sequence[int]:
        """How many of so many own heads are a part each (overlap.py)."""
        ...

    @property
    def num_meetings(self) -> int:
        """How often ranks waited for one another, where nothing tells one time from another."""
        ...

    def by_heads(self, shared: Sequence[Shared], parts: Sequence[slice]) -> Sequence[Arriving]:
        """Own tokens, all heads (B, S, H, D) for the tokens of all, own heads: by parts of these."""
        ...

    def by_tokens(self, heads: torch.Tensor, lengths: list[int], part: slice, num_own: int) -> Any:
        """The way back of a part of own heads, one part after the other.

        :param lengths: of the tokens of all ranks.
        :param num_own: heads that each rank has.
        """
        ...

    def joined(self, going: Sequence[Any]) -> torch.Tensor:
        """Own tokens, all heads (B, S, H, D), of what comes back."""
        ...


@dataclass(frozen=True)
class Coming:
    """Messages, each of tensors that are so wide."""

    messages: list[tuple[torch.Tensor, list[int]]]

    def answered(self, answer: Callable[[Sequence[torch.Tensor]], Any]) -> Any:
        return answer(
            [
                heads
                for message, widths in self.messages
                for heads in torch.split(arrived(message).transpose(0, 1), widths, dim=-1)
            ]
        )


@dataclass(frozen=True)
class Messages:
    """Ranks that exchange heads in messages of torch's.

    :ivar group: the name of theirs, by which compiled code knows it.
    :ivar index: of this one among them.
    """

    group: str
    index: int
    num: int
    num_meetings: ClassVar[int] = 0

    def parts(self, num: int, rows: int, num_tokens: int) -> list[int]:
        # With 9,728 tokens on four H200s 6 heads took 196 us, and a wave 120.
        return one_by_one(num, rows, num_tokens, self.num, cost=360)

    def by_heads(self, shared: Sequence[Shared], parts: Sequence[slice]) -> list[Coming]:
        by_rank = [
            [each.reshape(*each.shape[:2], self.num, -1, each.shape[-1]).permute(2, 1, 0, 3, 4) for each in tensors]
            for tensors, _ in shared
        ]
        coming = []
        for part in parts:
            messages = []
            for tensors, (_, lengths) in zip(by_rank, shared, strict=True):
                # One message for all of them, which are copied once.
                sent = torch.cat([each[:, :, :, part] for each in tensors], dim=-1).contiguous().flatten(0, 1)
                message = sent_to_all(sent, lengths, [lengths[self.index]] * self.num, self.group)
                messages.append((message, [each.shape[-1] for each in tensors]))
            coming.append(Coming(messages))
        return coming

    def by_tokens(self, heads: torch.Tensor, lengths: list[int], _part: slice, _num_own: int) -> torch.Tensor:
        own = [lengths[self.index]] * self.num
        return sent_to_all(heads.transpose(0, 1).contiguous(), own, lengths, self.group)

    def joined(self, going: Sequence[torch.Tensor]) -> torch.Tensor:
        back = [arrived(part) for part in going]
        by_rank = [part.view(self.num, -1, *part.shape[1:]).permute(2, 1, 0, 3, 4) for part in back]
        return torch.cat(by_rank, dim=3).flatten(2, 3)


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


def on_any_rank(is_so: bool, num_ranks: int, group: Any) -> bool:
    """Whether something is so on one of them; all hear the same."""
    return any(gathered_sizes(is_so, num_ranks, group))
