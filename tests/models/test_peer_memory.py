"""Memory that ranks write into: which rows go where, and how it grows."""

import ctypes
import itertools
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.rooms import write_rows
from sgld.models import peer_memory
from sgld.models.peer_memory import Room, Rows, has_atomics, rows_by_heads, rows_by_tokens

WIDTH = 4
PARTS = pytest.mark.parametrize("part", [slice(None), slice(1), slice(1, None)], ids=["all", "first", "rest"])
LENGTHS = pytest.mark.parametrize("lengths", [[3, 3], [4, 3, 3]], ids=["even", "uneven"])


def write(source: torch.Tensor, rooms: list[torch.Tensor], plan: list[Rows], columns: int, row: int) -> None:
    for room, rows in zip(rooms, plan, strict=True):
        write_rows(source, room, rows, columns, row)


def parts_of(whole: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    return [part.contiguous() for part in torch.split(whole, lengths, dim=1)]


@PARTS
@LENGTHS
def test_each_rank_writes_its_tokens_of_some_heads_between_those_of_others(lengths: list[int], part: slice) -> None:
    num, num_own = len(lengths), 3
    whole = torch.randn(2, sum(lengths), num * num_own, WIDTH)
    heads = range(num_own)[part]
    shape = (2, sum(lengths), len(heads), WIDTH)
    rooms = [torch.zeros(shape).flatten() for _ in lengths]
    for index, own in enumerate(parts_of(whole, lengths)):
        plan = rows_by_heads(index, lengths, heads, num_own, WIDTH)
        write(own, rooms, plan, len(heads) * WIDTH, len(heads) * WIDTH)
    for index, room in enumerate(rooms):
        first = index * num_own
        assert torch.equal(room.view(shape), whole[:, :, first + heads.start : first + heads.stop])


@LENGTHS
def test_results_of_all_parts_come_back_between_heads_of_others(lengths: list[int]) -> None:
    num, num_own = len(lengths), 3
    whole = torch.randn(2, sum(lengths), num * num_own, WIDTH)
    rooms = [torch.zeros(2 * length * num * num_own * WIDTH) for length in lengths]
    for index, part in itertools.product(range(num), (slice(1), slice(1, None))):
        own = whole[:, :, index * num_own : (index + 1) * num_own][:, :, part].contiguous()
        heads = range(num_own)[part]
        plan = rows_by_tokens(index, lengths, heads, num_own, WIDTH, own.stride(1))
        write(own, rooms, plan, len(heads) * WIDTH, num * num_own * WIDTH)
    for room, own in zip(rooms, parts_of(whole, lengths), strict=True):
        assert torch.equal(room.view(own.shape), own)


class Memory:
    """Stands for torch's symmetric memory, of a machine without GPUs."""

    def __init__(self) -> None:
        self.num_free = 10_000
        self.num_met = 0

    def empty(self, num_bytes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if num_bytes > self.num_free:
            raise RuntimeError("CUDA driver error: out of memory")
        return torch.empty(num_bytes, dtype=dtype)

    def rendezvous(self, memory: torch.Tensor, group: Any) -> Any:
        self.num_met += 1
        return SimpleNamespace(buffer_ptrs=[memory.data_ptr()] * 2, barrier=lambda: None)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    memory = Memory()
    monkeypatch.setattr(peer_memory, "symmetric_memory", memory)
    monkeypatch.setattr(peer_memory, "on_any_rank", lambda is_so, *_: is_so)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    return memory


def room() -> Room:
    return Room(None, 0, 2, torch.device("cpu"))


def test_places_do_not_overlap_and_are_the_same_again(memory: Memory) -> None:
    own = room()
    own.take([2000])
    own.clear()
    first = own.take([100, 300])
    assert own.take([10]) == [768]
    assert first == [0, 256]
    own.clear()
    assert own.take([100, 300]) == first
    own.view(256, (3, 5), torch.float32).fill_(1)
    assert own.view(256, (15,), torch.float32).sum() == 15


def test_graphs_find_all_that_a_room_was_when_it_has_grown(memory: Memory) -> None:
    own = room()
    own.take([1000])
    known = weakref.ref(own._memory), weakref.ref(own._addresses)
    own.take([3000])
    assert memory.num_met == 3
    assert own._addresses is not known[1]()
    assert all(each() is not None for each in known)


def test_all_ranks_lack_memory_where_one_does(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    own = room()
    with pytest.raises(torch.OutOfMemoryError, match=r"20224 bytes .* out of memory"):
        own.take([20_000])
    monkeypatch.setattr(peer_memory, "on_any_rank", lambda *_: True)
    with pytest.raises(torch.OutOfMemoryError, match="another rank"):
        own.take([1000])
    assert memory.num_met == 1
    assert own.take([100]) == [0]


@pytest.mark.parametrize(("value", "code", "wanted"), [(1, 0, True), (0, 0, False), (1, 101, False)])
def test_driver_says_whether_gpus_change_numbers_in_one_step(
    monkeypatch: pytest.MonkeyPatch, value: int, code: int, wanted: bool
) -> None:
    asked: list[tuple[int, ...]] = []

    def get(result: Any, ordinal: int) -> int:
        result._obj.value = 10 + ordinal
        return 0

    def get_attribute(result: Any, attribute: int, own: Any, other: Any) -> int:
        asked.append((attribute, own.value, other.value))
        result._obj.value = value
        return code

    driver = SimpleNamespace(cuDeviceGet=get, cuDeviceGetP2PAttribute=get_attribute)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert has_atomics(0, 2) is wanted
    assert asked == [(3, 10, 12)]


def test_meetings_are_counted(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    own = room()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    own.meet()
    own.meet()
    assert own.num_meetings == 2
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    own.meet()
    assert own.num_meetings == 2, "what a graph has isn't done yet"
