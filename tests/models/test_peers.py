"""Who writes into the memory of others, and attention as one operator of compiled code."""

import functools
import itertools
import shutil
import sys
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.models import attention_dispatch
from pipelines import build
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from models.rooms import write_rows
from sgld.models import peers, tokens
from sgld.models.exchange import Arriving, Messages, Shared
from sgld.models.peer_memory import Room, Rows
from sgld.models.peers import Peers, exchange_of
from sgld.models.placement import compile_components
from sgld.models.sequence import Sequence
from sgld.models.shared_attention import shared_attention
from sgld.models.tokens import TokenRanks


def test_ranks_without_gpus_send_messages(one_of_four: TokenRanks) -> None:
    assert exchange_of(one_of_four.group, 0, 4) == Messages(one_of_four.group.group_name, 0, 4)


@pytest.mark.parametrize(
    ("other", "has_access", "has_triton", "problem"),
    [
        (0, True, True, "several ranks have the same one"),
        (1, False, True, "0 isn't connected to 1 by NVLink"),
        (1, True, False, "peer_kernels"),
    ],
)
def test_gpus_that_cannot_reach_each_other_send_messages_and_say_so(
    one_of_four: TokenRanks,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    other: int,
    has_access: bool,
    has_triton: bool,
    problem: str,
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda _: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: has_access)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    monkeypatch.delattr("sgld.models.peer_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "sgld.models.peer_kernels", ModuleType("kernels") if has_triton else None)
    told = iter([[0, other]])
    monkeypatch.setattr(peers, "gathered_sizes", lambda *_: next(told))
    monkeypatch.setattr(peers, "on_any_rank", lambda is_so, *_: is_so)
    assert isinstance(exchange_of(one_of_four.group, 0, 2), Messages)
    assert problem in caplog.text
    assert "NCCL" in caplog.text


class FakeRoom(Room):
    """The room of one of them, of several."""

    def __init__(self, rooms: "Rooms", place: int) -> None:
        self._rooms, self._place, self._taken, self.num_meetings = rooms, place, 0, 0
        self._memory = torch.zeros(100_000, dtype=torch.uint8)

    def meet(self) -> None:
        self.num_meetings += 1

    def write(
        self, tensors: Several[torch.Tensor], plan: Several[Rows], starts: Several[int], columns: int, row: int
    ) -> None:
        for (tensor, start), (rank, rows) in itertools.product(zip(tensors, starts, strict=True), enumerate(plan)):
            other = self._rooms.every[rank][self._place]
            target = other.view(start, [(len(other._memory) - start) // tensor.itemsize], tensor.dtype)
            write_rows(tensor, target, rows, columns, row)


class Rooms:
    """Rooms of ranks that are one process, by rank: all that is written is there at once.

    :param kind: makes a room, of these and how many the rank has already.
    """

    def __init__(self, kind: Callable[["Rooms", int], FakeRoom] = FakeRoom) -> None:
        self._kind = kind
        self.every: dict[int, list[FakeRoom]] = {}

    def __call__(self, group: Any, index: int, num: int, device: torch.device) -> FakeRoom:
        own = self.every.setdefault(index, [])
        own.append(self._kind(self, len(own)))
        return own[-1]


@pytest.mark.parametrize(
    ("lengths", "key_lengths", "key_heads", "width", "sizes"),
    [
        ([4, 4, 4], [4, 4, 4], 12, 8, [1, 2, 1]),
        ([4, 3, 3], [4, 3, 3], 12, 8, [1, 2, 1]),
        ([4, 3, 3], [4, 3, 3], 12, 8, [1, 3]),
        ([4, 3, 3], [2, 2, 1], 3, 12, [4]),
    ],
    ids=["even", "uneven", "in two parts", "other keys"],
)
def test_heads_come_and_go_between_ranks(
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    key_lengths: list[int],
    key_heads: int,
    width: int,
    sizes: list[int],
) -> None:
    Streams(monkeypatch)
    monkeypatch.setattr(peers, "Room", Rooms())
    ranks = [Peers(None, index, 3, torch.device("cpu")) for index in range(3)]
    query = torch.randn(2, sum(lengths), 12, 8)
    key, value = (torch.randn(2, sum(key_lengths), key_heads, each) for each in (8, width))
    tokens_of = [torch.split(x, n, dim=1) for x, n in ((query, lengths), (key, key_lengths), (value, key_lengths))]
    is_alike = key_heads == 12
    parts = [slice(sum(sizes[:index]), sum(sizes[: index + 1])) for index in range(len(sizes))]
    coming = []
    for rank, own in zip(ranks, zip(*tokens_of, strict=True), strict=True):
        shared: list[Shared] = [(own, lengths)] if is_alike else [(own[:1], lengths), (own[1:], key_lengths)]
        coming.append(rank.by_heads(shared, parts))
    going: list[list[Any]] = [[], [], []]
    for num, part in enumerate(parts):
        come = [coming[index][num].come() for index in range(3)]
        for index, rank in enumerate(ranks):
            wanted = [x.tensor_split(3, dim=2)[index][:, :, part] for x in (query, key, value)]
            for heads, right in zip(come[index], wanted, strict=True):
                assert torch.equal(heads, right)
            going[index].append(rank.by_tokens(wanted[0].clone(), lengths, part, 4))
    assert [each.stream is None for each in coming[0]] == [False, False, True][-len(parts) :]
    for rank, sent, right in zip(ranks, going, tokens_of[0], strict=True):
        assert torch.equal(rank.joined(sent), right)
        assert rank.num_meetings == len(parts) + 1


class Stream:
    """A stream: what comes before what it does next."""

    def __init__(self, priority: int) -> None:
        self.priority, self.done = priority, set[str]()

    def wait_stream(self, other: "Stream") -> None:
        self.done |= other.done

    def wait_event(self, event: "Event") -> None:
        self.done |= event.done


class Event:
    """What was done on a stream when it was recorded."""

    def __init__(self, streams: "Streams") -> None:
        self._streams, self.done = streams, set[str]()

    def record(self) -> None:
        self.done = set(self._streams.current.done)


class Streams:
    """The streams of a GPU, in the place of torch's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.main = self.current = Stream(0)
        self.others: list[Stream] = []
        monkeypatch.setattr(torch.cuda, "Stream", self._made)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        monkeypatch.setattr(torch.cuda, "Event", functools.partial(Event, self))

    def _made(self, _device: torch.device, priority: int) -> Stream:
        self.others.append(Stream(priority))
        return self.others[-1]

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class Meeting(FakeRoom):
    """A room that notes what was done before ranks met."""

    def __init__(self, rooms: Rooms, streams: Streams, place: int) -> None:
        super().__init__(rooms, place)
        self._streams, self.before = streams, list[set[str]]()

    def meet(self) -> None:
        super().meet()
        self.before.append(set(self._streams.current.done))
        self._streams.current.done.add(f"met {self._place} {self.num_meetings}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(monkeypatch)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, streams: Streams) -> Peers:
    """A rank that has all tokens."""
    monkeypatch.setattr(peers, "Room", Rooms(lambda rooms, place: Meeting(rooms, streams, place)))
    return Peers(None, 0, 1, torch.device("cpu"))


PARTS = [slice(0, 1), slice(1, 3), slice(3, 4)]


def test_each_part_is_attended_to_when_it_has_come_and_all_are_joined(alone: Peers, streams: Streams) -> None:
    whole = torch.randn(1, 5, 4, 8)

    def attended(num: int, heads: Several[torch.Tensor]) -> Any:
        assert f"met 0 {num + 1}" in streams.current.done
        streams.current.done.add(f"attended to {num}")
        return alone.by_tokens(heads[0], [5], PARTS[num], 4)

    coming = alone.by_heads([([whole], [5])], PARTS)
    where = [part.stream for part in coming]
    going = [part.answered(functools.partial(attended, num)) for num, part in enumerate(coming)]
    assert torch.equal(alone.joined(going), whole)
    back: Any = alone._back
    assert back.before[-1] >= {f"attended to {num}" for num in range(3)}
    assert where == [*streams.others, None]
    assert [stream.priority for stream in streams.others] == [-2, -1]


@pytest.mark.parametrize("failing", range(3))
def test_what_follows_an_attention_that_failed_comes_after_all_of_it(
    alone: Peers, streams: Streams, failing: int
) -> None:
    def attended(num: int, _heads: Several[torch.Tensor]) -> None:
        streams.current.done.add(f"attended to {num}")
        if num == failing:
            raise torch.OutOfMemoryError("no memory")

    coming = alone.by_heads([([torch.randn(1, 5, 4, 8)], [5])], PARTS)
    for num, part in enumerate(coming[:failing]):
        part.answered(functools.partial(attended, num))
    with pytest.raises(torch.OutOfMemoryError):
        coming[failing].answered(functools.partial(attended, failing))
    assert streams.main.done >= {f"attended to {num}" for num in range(failing + 1)}


class Twice(Peers):
    """The first of two ranks, of which the other one has the same tokens, and finds the same."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        """Parts of each attention."""

    def parts(self, num: int, rows: int, num_tokens: int) -> tuple[int, ...]:
        return (num,)

    def by_heads(self, shared: Several[Shared], parts: Several[slice]) -> Any:
        self.asked.append(len(parts))
        own = [tensor[:, :, : tensor.shape[2] // 2] for tensors, _ in shared for tensor in tensors]
        return [There([torch.cat([tensor[:, :, part]] * 2, dim=1) for tensor in own]) for part in parts]

    def by_tokens(self, heads: torch.Tensor, lengths: list[int], part: slice, num_own: int) -> Any:
        return heads[:, : lengths[0]]

    def joined(self, going: Several[Any]) -> torch.Tensor:
        return torch.cat([*going, *going], dim=2)


class There(Arriving):
    """Heads that have come."""

    def __init__(self, heads: list[torch.Tensor]) -> None:
        self._heads = heads

    def answered(self, answer: Callable[[Several[torch.Tensor]], Any]) -> Any:
        return answer(self._heads)


def gathered(part: torch.Tensor, dim: int, lengths: list[int], _: Any) -> torch.Tensor:
    return torch.cat([part.narrow(dim, 0, length) for length in lengths], dim=dim)


compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++, which isn't here")


@compiles
@pytest.mark.parametrize("height", [8, 6], ids=["even", "uneven"])
def test_compiled_code_asks_for_attention_as_one_operator(
    one_of_four: TokenRanks, monkeypatch: pytest.MonkeyPatch, height: int
) -> None:
    monkeypatch.setattr(tokens, "gathered", gathered)
    monkeypatch.setattr(tokens, "gathered_sizes", lambda num, *_: [num, num - 1])
    exchange = Twice()
    models = [build("wan")[0].transformer for _ in range(2)]
    ranks = replace(one_of_four, num_ulysses=2, exchange=exchange)
    sequences = [Sequence(model, ranks) for model in models]
    config = models[0].config
    latents, text = torch.randn(1, config.in_channels, 3, height, 6), torch.randn(1, 4, config.text_dim)
    given = latents, torch.tensor([5]), text
    compiled = []
    with torch.no_grad():
        for model, sequence in zip(models, sequences, strict=True):
            forward = functools.partial(model, *given, return_dict=False)
            [wanted] = sequence.run("a course", forward)
            num = len(exchange.asked)
            compile_components({"transformer": model})
            result, codes = run_and_get_code(sequence.run, "a course", forward)
            [again] = sequence.run("a course", forward)
            assert len(exchange.asked) == 3 * num > 0
            exchange.asked.clear()
            torch.testing.assert_close(result[0], wanted)
            torch.testing.assert_close(again, wanted)
            assert any("sgld.shared_attention" in code for code in codes)
            compiled.append(counters["inductor"]["fxgraph_cache_miss"])
    # Another one of the same kind has the same code.
    assert compiled[0] == compiled[1]


@compiles
def test_kernels_with_options_of_their_own_are_part_of_that_operator(
    one_of_four: TokenRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As diffusers has them of FlashAttention."""
    windows: list[tuple[int, int]] = []

    def windowed(*args: Any, window_size: tuple[int, int], **kwargs: Any) -> Any:
        windows.append(window_size)
        return attention_dispatch._native_attention_forward_op(*args, **kwargs)

    monkeypatch.setattr(attention_dispatch, "windowed", windowed, raising=False)
    shares = tokens.Tokens("Model", replace(one_of_four, num_ulysses=2, exchange=Twice()))
    shares.begin([], is_uneven=False)
    kernel = functools.partial(windowed, window_size=(-1, 1))
    query = torch.randn(1, 6, 4, 8)

    def attend(query: torch.Tensor) -> torch.Tensor:
        return shared_attention(query, query, query, forward_op=kernel, _parallel_config=shares) + 1

    with torch.no_grad():
        wanted = attend(query)
        result = torch.compile(attend, fullgraph=True)(query)
    torch.testing.assert_close(result, wanted)
    assert set(windows) == {(-1, 1)}
