"""GPUs that write heads into one another's memory: nothing is gathered to be sent, and it arrives where it is read.

Each rank has a room for heads that come, and one for results that come back. Nobody writes into a room before its owner
has read what was there: heads are read before results are sent, and results before the next heads are; each time, all
ranks meet.
"""

import itertools
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from sgld.models.exchange import Messages, Shared, gathered_sizes, on_any_rank
from sgld.models.overlap import beside_one_another
from sgld.models.peer_memory import Room, has_atomics, rows_by_heads, rows_by_tokens
from sgld.outcome import on_failure

logger = logging.getLogger(__name__)
_PARTS = [slice(0, 1), slice(1, 2), slice(2, 3)]
Placed = tuple[torch.Tensor, list[int], tuple[int, ...], int]
"""A tensor, how many of its tokens each rank has, what shape comes together here, and where."""


@dataclass(frozen=True)
class Coming:
    """Heads that others write: those of several tensors (B, S, H, D).

    :ivar come: writes those of others, and waits for own ones.
    :ivar stream: where they are attended to; None: with what else is computed.
    :ivar before: where those are that came before.
    """

    come: Callable[[], list[torch.Tensor]]
    stream: torch.cuda.Stream | None
    before: Sequence[torch.cuda.Stream]

    def answered(self, answer: Callable[[Sequence[torch.Tensor]], Any]) -> Any:
        begun = [*self.before]
        with on_failure(lambda: _joined(begun)):
            heads = self.come()
            if self.stream is None:
                return answer(heads)
            self.stream.wait_stream(torch.cuda.current_stream())
            begun.append(self.stream)
            with torch.cuda.stream(self.stream):
                return answer(heads)


@dataclass(frozen=True)
class Going:
    """Results on their way: (B, S, H, D) when all are there. Until then `heads` is read.

    :ivar event: they have been written then, of what isn't with the rest.
    """

    heads: torch.Tensor
    shape: tuple[int, ...]
    event: torch.cuda.Event | None


class Peers:
    """The GPUs of ranks that exchange heads.

    What comes first is attended to before anything else. Others are written, and attended to beside it, where the GPU
    has room; each part goes while those after it are attended to.

    :param group: theirs.
    :param index: of this one among them.
    """

    def __init__(self, group: Any, index: int, num: int, device: torch.device) -> None:
        self._index, self._num = index, num
        self._coming, self._back = (Room(group, index, num, device) for _ in range(2))
        # Of all parts but the last one, the most urgent first.
        self._streams = [torch.cuda.Stream(device, priority=level) for level in (-2, -1)]  # type: ignore[no-untyped-call]

    @property
    def num_meetings(self) -> int:
        return self._coming.num_meetings + self._back.num_meetings

    def parts(self, num: int, rows: int, num_tokens: int) -> tuple[int, ...]:
        # With 9,728 tokens on two H200s 12 heads take 180 us, and a wave 133.
        return beside_one_another(num, rows, num_tokens, self._num, cost=220)

    def by_heads(self, shared: Sequence[Shared], parts: Sequence[slice]) -> list[Coming]:
        tensors = [(_by_rows(tensor), lengths) for alike, lengths in shared for tensor in alike]
        self._coming.clear()
        every = [
            [(tensor, lengths, self._shape(tensor, lengths, part)) for tensor, lengths in tensors] for part in parts
        ]
        starts = iter(self._coming.take([math.prod(s) * x.itemsize for of_part in every for x, _, s in of_part]))
        placed = [[(*each, next(starts)) for each in of_part] for of_part in every]
        # A part that came with the one before it could be attended to first.
        beside = self._streams[: len(parts) - 1]
        return [
            Coming(partial(self._come, of_part, part), stream, beside[:index])
            for index, (part, of_part, stream) in enumerate(zip(parts, placed, [*beside, None], strict=True))
        ]

    def _come(self, placed: Sequence[Placed], part: slice) -> list[torch.Tensor]:
        heads = self._put_heads(placed, part)
        self._coming.meet()
        return heads

    def _shape(self, tensor: torch.Tensor, lengths: list[int], part: slice) -> tuple[int, ...]:
        num_rows, _, num_heads, width = tensor.shape
        return num_rows, sum(lengths), len(range(num_heads // self._num)[part]), width

    def _put_heads(self, placed: Sequence[Placed], part: slice) -> list[torch.Tensor]:
        # Those that are alike go at once.
        for _, group in itertools.groupby(placed, lambda each: _form(*each[:2])):
            alike = list(group)
            first, lengths, (_, _, num_heads, width), _ = alike[0]
            num_own = first.shape[2] // self._num
            plan = rows_by_heads(self._index, lengths, range(num_own)[part], num_own, width)
            columns = num_heads * width
            self._coming.write([each for each, *_ in alike], plan, [start for *_, start in alike], columns, columns)
        return [self._coming.view(start, shape, tensor.dtype) for tensor, _, shape, start in placed]

    def by_tokens(self, heads: torch.Tensor, lengths: list[int], part: slice, num_own: int) -> Going:
        heads, chosen = _by_rows(heads), range(num_own)[part]
        num_rows, _, _, width = heads.shape
        num_all, is_last = self._num * num_own, chosen.stop == num_own
        if not chosen.start:
            self._back.clear()
            self._back.take([num_rows * max(lengths) * num_all * width * heads.itemsize])
        plan = rows_by_tokens(self._index, lengths, chosen, num_own, width, heads.stride(1))
        self._back.write([heads], plan, [0], len(chosen) * width, num_all * width)
        return Going(heads, (num_rows, lengths[self._index], num_all, width), None if is_last else _event())

    def joined(self, going: Sequence[Going]) -> torch.Tensor:
        for each in going:
            if each.event is not None:
                torch.cuda.current_stream().wait_event(each.event)
        self._back.meet()
        return self._back.view(0, going[0].shape, going[0].heads.dtype).clone()


def _joined(streams: Sequence[torch.cuda.Stream]) -> None:
    """What follows comes after all that is there."""
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)


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
    peers, problem = None, _unreachable(device.index, devices)
    # Nobody begins with what takes all of them while one can't.
    if not on_any_rank(problem is not None, num, group):
        peers, problem = _tried(group, index, num, device)
    if not on_any_rank(peers is None, num, group) and peers is not None:
        return peers
    logger.warning(
        "GPUs %s can't write into one another's memory (%s): heads are exchanged by NCCL, which takes longer",
        ", ".join(map(str, devices)),
        problem or "another one says why",
    )
    return messages


def _unreachable(own: int, devices: Sequence[int]) -> str | None:
    """Why this GPU can't write into the memory of others."""
    others = [other for other in devices if other != own]
    if len(set(devices)) < len(devices):
        return "several ranks have the same one"
    if os.environ.get("NCCL_P2P_DISABLE") == "1":
        return "NCCL_P2P_DISABLE forbids it"
    try:
        from sgld.models import peer_kernels  # noqa: F401

        # Ranks meet by numbers that several of them change.
        missing = [n for n in others if not (torch.cuda.can_device_access_peer(own, n) and has_atomics(own, n))]
    except (ImportError, OSError) as error:
        return str(error)
    return f"{own} isn't connected to {', '.join(map(str, missing))} by NVLink" if missing else None


def _tried(group: Any, index: int, num: int, device: torch.device) -> tuple[Peers | None, str | None]:
    """Peers if heads that are sent there and back are what they were, or what is in the way."""
    own = torch.arange(3 * num * 8, device=device).float().view(1, 1, 3 * num, 8) + 1000 * index
    try:
        peers = Peers(group, index, num, device)
        coming = peers.by_heads([([own], [1] * num)], _PARTS)

        def back(part: slice, heads: Sequence[torch.Tensor]) -> Going:
            return peers.by_tokens(heads[0], [1] * num, part, 3)

        going = [heads.answered(partial(back, part)) for heads, part in zip(coming, _PARTS, strict=True)]
        is_same = torch.equal(peers.joined(going), own)
    except Exception as error:  # noqa: BLE001 - compilers, drivers and sockets fail in ways of their own
        return None, f"{type(error).__name__}: {error}"
    return (peers, None) if is_same else (None, "what was written didn't arrive")
