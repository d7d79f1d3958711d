"""The tokens of a forward in parts, one for each rank of a group, and attention among all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from sgld.models.exchange import HeadExchange, Shared, gathered, gathered_sizes
from sgld.models.peers import exchange_of

Compute = Callable[..., torch.Tensor]
"""Attention of (B, S, H, D) tensors on one rank: query, key, value, mask."""


class UnevenTokens(Exception):
    """So many tokens aren't a multiple of the ranks: they are tried unevenly."""


@dataclass(frozen=True)
class TokenRanks:
    """Ranks that share tokens: `num_ring` times `num_ulysses`, of which this one has the part `index`.

    :ivar exchange: how some of them exchange heads; None: nobody does.
    :ivar overlaps: some heads come and go while others are attended to.
    """

    group: Any
    ring: Any
    exchange: HeadExchange | None
    num_ring: int
    num_ulysses: int
    index: int
    overlaps: bool = True

    @property
    def num(self) -> int:
        return self.num_ring * self.num_ulysses

    @classmethod
    def alone(cls) -> "TokenRanks":
        """One that has all tokens."""
        return cls(None, None, None, 1, 1, 0)

    @classmethod
    def of(cls, mesh: DeviceMesh) -> "TokenRanks":
        """Those of a mesh ("ring", "ulysses")."""
        ring, ulysses = mesh["ring"], mesh["ulysses"]
        index = ulysses.get_local_rank()
        return cls(
            mesh._flatten().get_group(),
            ring.get_group(),
            exchange_of(ulysses.get_group(), index, ulysses.size()),
            ring.size(),
            ulysses.size(),
            ring.get_local_rank() * ulysses.size() + index,
        )


class Tokens:
    """How the tokens of one component are split among ranks; its hooks and its attention ask here.

    Parts are equal, or those of `torch.tensor_split` where `is_uneven`. Ranks then tell each other how long theirs are
    in the first forward of each course; later ones, which do the same in the same order, know it.
    """

    running: ClassVar["Tokens | None"] = None
    """Those of the forward that began last, which compiled code asks: it is the same for several models."""

    def __init__(self, name: str, ranks: TokenRanks) -> None:
        self.ranks = ranks
        self.is_uneven = False
        self._name = name
        self._lengths: list[list[int]] = []
        """In the order in which a forward asks for them."""
        self._num_asked = 0

    def begin(self, lengths: list[list[int]], *, is_uneven: bool) -> None:
        """A forward begins.

        :param lengths: what is known from others of its course, and what is found out in this one.
        """
        self._lengths, self._num_asked, self.is_uneven = lengths, 0, is_uneven
        Tokens.running = self

    def again(self) -> None:
        """The forward begins once more, and asks for the same."""
        self._num_asked = 0

    def part(self, whole: torch.Tensor, dim: int, unit: int = 1) -> torch.Tensor:
        """The part of this rank of what all ranks have.

        :param unit: so many tokens stay together.
        :raises UnevenTokens: the parts would differ in length, and weren't meant to.
        :raises ValueError: there are fewer tokens than ranks.
        """
        start, stop = self.bounds(whole.shape[dim] // unit)
        return whole.narrow(dim, start * unit, (stop - start) * unit)

    def bounds(self, num: int) -> tuple[int, int]:
        """From and to of so many tokens; raises as `part`."""
        num_ranks, index = self.ranks.num, self.ranks.index
        if num < num_ranks:
            raise ValueError(f"{self._name} has a sequence of {num} tokens, which sp_degree {num_ranks} can't share")
        if num % num_ranks and not self.is_uneven:
            raise UnevenTokens(f"{num} tokens of {self._name} for {num_ranks} ranks")
        size, more = divmod(num, num_ranks)
        start = index * size + min(index, more)
        return start, start + size + (index < more)

    def lengths(self, num: int) -> list[int]:
        """How long the parts of all ranks are, of which this one's is `num`."""
        return self._told(num) if self.is_uneven else [num] * self.ranks.num

    def _both_lengths(self, num: int, num_keys: int) -> tuple[list[int], list[int], bool]:
        """Of queries and of keys, and whether they are alike on all ranks."""
        if self.is_uneven:
            return self._told_both(num, num_keys)  # type: ignore[no-any-return]
        return self.lengths(num), self.lengths(num_keys), num == num_keys

    # Compiled by torch 2.13, comparing two lists of numbers that it doesn't know can fail in what follows.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _told_both(self, num: int, num_keys: int) -> tuple[list[int], list[int], bool]:
        lengths, key_lengths = self._told(num), self._told(num_keys)
        return lengths, key_lengths, lengths == key_lengths

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _told(self, num: int) -> list[int]:
        if self._num_asked == len(self._lengths):
            self._lengths.append(gathered_sizes(num, self.ranks.num, self.ranks.group))
        known = self._lengths[self._num_asked]
        self._num_asked += 1
        if known[self.ranks.index] != num:
            problem = f"{known[self.ranks.index]} tokens were expected at a place where there are {num}"
            raise RuntimeError(
                f"{self._name} went through its layers in another way than with arguments alike: {problem}"
            )
        return known

    def whole(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        """What all ranks have, on each of them."""
        if self.ranks.num == 1:
            return part
        return gathered(part, dim, self.lengths(part.shape[dim]), self.ranks.group)

    def total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors."""
        if self.ranks.num == 1:
            return part
        part = part.contiguous()
        dist.all_reduce(part, group=self.ranks.group)
        return part

    def with_neighbours(self, rows: torch.Tensor) -> torch.Tensor:
        """Own rows (B, C, H, W), with one more of those of other ranks on each side, or zeros."""
        if self.ranks.num == 1:
            return functional.pad(rows, (0, 0, 1, 1))
        edges = torch.cat((rows[:, :, :1], rows[:, :, -1:]), dim=2)
        all_edges = gathered(edges, 2, [2] * self.ranks.num, self.ranks.group)
        padded = functional.pad(all_edges, (0, 0, 1, 1))
        first = 2 * self.ranks.index
        return torch.cat((padded[:, :, first : first + 1], rows, padded[:, :, first + 3 : first + 4]), dim=2)

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        compute: Compute,
    ) -> torch.Tensor:
        """Attention of this rank's queries (B, S, H, D) to the keys and values of all ranks.

        Ulysses: ranks exchange tokens for heads. Ring: then keys and values of the same heads come together.
        A mask is for all keys in the order of the ranks, or for those of this rank.
        """
        ranks, num_heads = self.ranks, query.shape[2]
        if ranks.num == 1:
            return compute(query, key, value, mask)
        lengths, key_lengths, is_alike = self._both_lengths(query.shape[1], key.shape[1])
        # All ranks must find the same.
        is_alike = is_alike and query.shape[2:] == key.shape[2:] == value.shape[2:]
        if mask is not None:
            mask = self._mask_of_keys(mask, num_heads, key.shape[1], key_lengths)
        if key.shape[2] != num_heads and key.shape[2] % ranks.num_ulysses:
            key, value = (x.repeat_interleave(num_heads // x.shape[2], dim=2) for x in (key, value))
        if ranks.num_ulysses == 1:
            return compute(query, *self._of_ring(key, value, key_lengths), mask)
        exchange = ranks.exchange
        assert exchange is not None
        num_own = -(-num_heads // ranks.num_ulysses)
        can_part = is_alike and (mask is None or mask.shape[1] == 1) and ranks.overlaps and ranks.num_ring == 1
        sizes = exchange.parts(num_own, query.shape[0], sum(lengths)) if can_part else [num_own]
        parts = [slice(sum(sizes[:index]), sum(sizes[: index + 1])) for index in range(len(sizes))]
        own_lengths = self._of_ulysses(lengths)
        query, key, value = (self._padded(each) for each in (query, key, value))
        shared: list[Shared] = [((query, key, value), own_lengths)]
        if not is_alike:
            shared = [((query,), own_lengths), ((key, value), self._of_ulysses(key_lengths))]
        coming = exchange.by_heads(shared, parts)

        def answered(part: slice, heads: Sequence[torch.Tensor]) -> Any:
            own_query, own_key, own_value = heads
            if ranks.num_ring > 1:
                own_key, own_value = self._of_ring(own_key, own_value, key_lengths)
            own_mask = self._own_heads(mask, own_query.shape[2])
            result = compute(own_query, own_key, own_value, own_mask)
            return exchange.by_tokens(result, own_lengths, part, num_own)

        going = [heads.answered(partial(answered, part)) for part, heads in zip(parts, coming, strict=True)]
        return exchange.joined(going)[:, :, :num_heads]

    def _padded(self, tensor: torch.Tensor) -> torch.Tensor:
        """With as many heads (B, S, H, D) for each rank."""
        missing = -tensor.shape[2] % self.ranks.num_ulysses
        return functional.pad(tensor, (0, 0, 0, missing)) if missing else tensor

    def _of_ring(self, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the same heads (B, S, H, D), of all ranks."""
        num = self.ranks.num_ulysses
        by_ring = [sum(lengths[start : start + num]) for start in range(0, self.ranks.num, num)]
        pairs = gathered(torch.cat((key, value), dim=-1), 1, by_ring, self.ranks.ring)
        key, value = torch.split(pairs, [key.shape[-1], value.shape[-1]], dim=-1)
        return key, value

    def _mask_of_keys(self, mask: torch.Tensor, num_heads: int, num_own: int, lengths: list[int]) -> torch.Tensor:
        """The mask of all keys, as (B, 1 or H, 1, S)."""
        if mask.ndim == 2:
            mask = mask[:, None, None, :]
        is_known = mask.ndim == 4 and mask.shape[1] in (1, num_heads) and mask.shape[2] == 1
        if not is_known or mask.shape[3] not in (num_own, sum(lengths)):
            raise ValueError(f"{self._name} has a mask of {tuple(mask.shape)}, which can't be shared by its tokens")
        return mask if mask.shape[3] == sum(lengths) else gathered(mask, 3, lengths, self.ranks.group)

    def _own_heads(self, mask: torch.Tensor | None, num: int) -> torch.Tensor | None:
        """Of a mask for each head that of so many own ones."""
        if mask is None or mask.shape[1] == 1:
            return mask
        index = self.ranks.index % self.ranks.num_ulysses
        missing = self.ranks.num_ulysses * num - mask.shape[1]
        return functional.pad(mask, (0, 0, 0, 0, 0, missing)).narrow(1, index * num, num)

    def _of_ulysses(self, lengths: list[int]) -> list[int]:
        """Of the parts of all ranks those of the ones that exchange heads with this one."""
        start = self.ranks.index // self.ranks.num_ulysses * self.ranks.num_ulysses
        return lengths[start : start + self.ranks.num_ulysses]
