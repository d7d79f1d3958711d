"""GPUs that write heads into one another's memory: nothing is gathered to be sent, and it arrives where it is read.

Each rank has a room for heads that come, and one for results that come back. Nobody writes into a room before its owner
has read what was there: heads are read before results are sent, and results before the next heads are; each time, all
ranks meet.
"""

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symmetric_memory

from sgld.models.exchange import Messages, Shared, gathered_sizes

logger = logging.getLogger(__name__)
_ALIGNED_BYTES = 256
# So many elements at once are 16 bytes, of numbers of two.
_UNIT = 8


@dataclass(frozen=True)
class Rows:
    """What one rank gets of a tensor, in elements.

    :ivar source: where the first row is in each batch.
    :ivar target: where it goes in that of the other.
    :ivar batch: so far apart batches are there.
    """

    num: int
    source: int
    target: int
    batch: int


def rows_by_heads(index: int, lengths: Sequence[int], heads: range, num_own: int, width: int) -> list[Rows]:
    """Own tokens (B, S, H, D) for (B, all S, `heads` of H, D) of each rank.

    :param heads: some of those that each rank has.
    :param num_own: so many each rank has.
    :param width: of a head.
    """
    columns = len(heads) * width
    target, batch = sum(lengths[:index]) * columns, sum(lengths) * columns
    return [Rows(lengths[index], (rank * num_own + heads.start) * width, target, batch) for rank in range(len(lengths))]


def rows_by_tokens(index: int, lengths: Sequence[int], heads: range, num_own: int, width: int, row: int) -> list[Rows]:
    """Some of own heads (B, all S, `heads` of H, D) for (B, S, H, D) of each rank.

    :param row: so far apart tokens are.
    """
    target, columns = (index * num_own + heads.start) * width, len(lengths) * num_own * width
    return [Rows(num, sum(lengths[:rank]) * row, target, num * columns) for rank, num in enumerate(lengths)]


class Room:
    """Memory of this GPU that others write into. It grows; what graphs know of it stays."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group, self._device = group, device
        self._kept: list[torch.Tensor] = []
        self._grow(_ALIGNED_BYTES)

    def _grow(self, num_bytes: int) -> None:
        """All ranks do, at the same time."""
        self._memory = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._handle = symmetric_memory.rendezvous(self._memory, self._group)
        self.addresses = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=self._device)
        self._kept.append(self._memory)
        self._taken = 0

    def clear(self) -> None:
        """What is there isn't needed any longer."""
        self._taken = 0

    def take(self, sizes: Sequence[int]) -> list[int]:
        """Where so many bytes each have place, in the rooms of all ranks alike."""
        places = [-(-size // _ALIGNED_BYTES) * _ALIGNED_BYTES for size in sizes]
        if self._taken + sum(places) > self._memory.numel():
            self._grow(max(sum(places), 2 * self._memory.numel()))
        starts = list(itertools.accumulate(places, initial=self._taken))
        self._taken = starts.pop()
        return starts

    def view(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """What is there until others write over it."""
        return self._memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)

    def meet(self, channel: int = 0) -> None:
        """Go on when all ranks are here, and what they wrote before has come."""
        self._handle.barrier(channel)


@dataclass(frozen=True)
class Target:
    """Where tensors are written to.

    :ivar start: of the first, in bytes; `between` it and the next one.
    :ivar row: so far apart rows are, in elements.
    """

    room: Room
    start: int
    between: int
    row: int


@dataclass(frozen=True)
class Coming:
    """Heads that others write: those of several tensors (B, S, H, D). Until then `sources` are read."""

    heads: list[torch.Tensor]
    sources: Sequence[tuple[torch.Tensor, list[int]]]
    event: torch.cuda.Event | None

    def arrived(self) -> list[torch.Tensor]:
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)
        return self.heads


@dataclass(frozen=True)
class Going:
    """Results on their way: (B, S, H, D) when all are there. Until then `heads` is read."""

    heads: torch.Tensor
    shape: tuple[int, ...]
    event: torch.cuda.Event | None


class Peers:
    """The GPUs of ranks that exchange heads.

    :param group: theirs.
    :param index: of this one among them.
    """

    # With 9,728 tokens on two H200s 12 heads take 180 us, and a wave 133.
    cost = 220

    def __init__(self, group: Any, index: int, num: int, device: torch.device) -> None:
        self._index, self._num, self._device = index, num, device
        self._coming, self._back = Room(group, device), Room(group, device)
        # What is waited for comes before the rest of an attention.
        self._side = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._plans: dict[tuple[Rows, ...], torch.Tensor] = {}

    def by_heads(self, shared: Sequence[Shared], parts: Sequence[slice]) -> list[Coming]:
        tensors = [(_by_rows(tensor), lengths) for alike, lengths in shared for tensor in alike]
        self._coming.clear()
        coming = []
        for channel, part in enumerate(parts):
            with self._aside(channel > 0):
                heads = self._put_heads(tensors, part)
                self._coming.meet(channel)
                coming.append(Coming(heads, tensors, _event() if channel else None))
        return coming

    def _put_heads(self, tensors: Sequence[tuple[torch.Tensor, list[int]]], part: slice) -> list[torch.Tensor]:
        shapes = [self._shape(tensor, lengths, part) for tensor, lengths in tensors]
        sizes = [math.prod(shape) * tensor.itemsize for (tensor, _), shape in zip(tensors, shapes, strict=True)]
        starts = self._coming.take(sizes)
        every = list(zip(tensors, shapes, starts, strict=True))
        # Those that are alike go at once.
        for _, group in itertools.groupby(every, lambda each: _form(*each[0])):
            alike = list(group)
            (first, lengths), (_, _, num_heads, width), start = alike[0]
            num_own = first.shape[2] // self._num
            plan = rows_by_heads(self._index, lengths, range(num_own)[part], num_own, width)
            between = alike[1][2] - start if len(alike) > 1 else 0
            target = Target(self._coming, start, between, num_heads * width)
            self._put([tensor for (tensor, _), *_ in alike], plan, target, num_heads * width)
        return [self._coming.view(start, shape, tensor.dtype) for (tensor, _), shape, start in every]

    def _shape(self, tensor: torch.Tensor, lengths: list[int], part: slice) -> tuple[int, ...]:
        num_rows, _, num_heads, width = tensor.shape
        return num_rows, sum(lengths), len(range(num_heads // self._num)[part]), width

    def by_tokens(self, heads: torch.Tensor, lengths: list[int], part: slice, num_own: int) -> Going:
        heads, chosen = _by_rows(heads), range(num_own)[part]
        num_rows, _, _, width = heads.shape
        num_all, is_last = self._num * num_own, chosen.stop == num_own
        if not chosen.start:
            self._back.clear()
            self._back.take([num_rows * max(lengths) * num_all * width * heads.itemsize])
        plan = rows_by_tokens(self._index, lengths, chosen, num_own, width, heads.stride(1))
        with self._aside(not is_last):
            self._put([heads], plan, Target(self._back, 0, 0, num_all * width), len(chosen) * width)
            shape = (num_rows, lengths[self._index], num_all, width)
            return Going(heads, shape, None if is_last else _event())

    def joined(self, going: Sequence[Going]) -> torch.Tensor:
        for each in going:
            if each.event is not None:
                torch.cuda.current_stream().wait_event(each.event)
        self._back.meet()
        return self._back.view(0, going[0].shape, going[0].heads.dtype).clone()

    def _put(self, tensors: Sequence[torch.Tensor], plan: Sequence[Rows], target: Target, columns: int) -> None:
        """Write up to three tensors that are alike, so much of each row."""
        from sgld.models.peer_kernels import COLUMNS, ROWS, put

        first, num_rows = tensors[0], tensors[0].shape[0]
        tiles = -(-max(rows.num for rows in plan) // ROWS) * -(-columns // COLUMNS)
        start, between = target.start // first.itemsize, target.between // first.itemsize
        together = math.gcd(_UNIT, columns, target.row, *(n for rows in plan for n in astuple(rows)[1:]))
        put[(self._num, tiles, len(tensors) * num_rows)](
            first, tensors[len(tensors) // 2], tensors[-1], self._on_device(tuple(plan)), target.room.addresses, start,
            num_rows, first.stride(0), first.stride(1), between, target.row, columns, self._num, self._index,
            UNIT=together, ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip

    def _on_device(self, plan: tuple[Rows, ...]) -> torch.Tensor:
        known = self._plans.get(plan)
        if known is None:
            known = torch.tensor([astuple(rows) for rows in plan], dtype=torch.int64, device=self._device)
            self._plans[plan] = known
        return known

    @contextmanager
    def _aside(self, is_aside: bool) -> Iterator[None]:
        """On another stream, after what is under way."""
        if not is_aside:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            yield


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def _by_rows(tensor: torch.Tensor) -> torch.Tensor:
    """With heads (B, S, H, D) of a token together."""
    is_together = tensor.stride(3) == 1 and tensor.stride(2) == tensor.shape[3]
    return tensor if is_together else tensor.contiguous()


def _form(tensor: torch.Tensor, lengths: list[int]) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, lengths


def exchange_of(group: Any, index: int, num: int) -> Messages | Peers:
    """How the ranks of a group exchange heads: all of them find the same."""
    messages = Messages(group.group_name, index, num)
    if num == 1 or "nccl" not in str(dist.get_backend_config(group)):
        return messages
    device = torch.device("cuda", torch.cuda.current_device())
    devices = gathered_sizes(device.index, num, group)
    problem, peers = _unreachable(device.index, devices), None
    if not any(gathered_sizes(problem is not None, num, group)):
        try:
            peers = Peers(group, index, num, device)
            problem = None if _arrives(peers, index, num, device) else "what was written didn't arrive"
        except (RuntimeError, ImportError, OSError) as error:
            problem = str(error)
        if peers is not None and not any(gathered_sizes(problem is not None, num, group)):
            return peers
    logger.warning(
        "GPUs %s can't write into one another's memory (%s): heads are exchanged by NCCL, which takes longer",
        ", ".join(map(str, devices)),
        problem or "another one says so",
    )
    return messages


def _unreachable(own: int, devices: Sequence[int]) -> str | None:
    """Why this GPU can't write into the memory of others."""
    if len(set(devices)) < len(devices):
        return "several ranks have the same one"
    missing = [other for other in devices if other != own and not torch.cuda.can_device_access_peer(own, other)]
    if missing:
        return f"{own} has no access to {', '.join(map(str, missing))}"
    try:
        from sgld.models import peer_kernels  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def _arrives(peers: Peers, index: int, num: int, device: torch.device) -> bool:
    """Whether heads that are sent there and back are what they were."""
    own = torch.arange(2 * num * 8, device=device).float().view(1, 1, 2 * num, 8) + 1000 * index
    going = [
        peers.by_tokens(coming.arrived()[0].clone(), [1] * num, part, 2)
        for coming, part in zip(peers.by_heads([([own], [1] * num)], _HALVES), _HALVES, strict=True)
    ]
    return bool(torch.equal(peers.joined(going), own))


_HALVES = [slice(1), slice(1, None)]
