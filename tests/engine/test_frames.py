"""The frames of one result."""

import logging
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sgld.engine.frames import FrameStore

FRAME_BYTES = 2 * 3 * 3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache"


def frames(first: int, last: int) -> NDArray[np.uint8]:
    """Frames that show their own index, (F, 2, 3, 3)."""
    return np.broadcast_to(np.arange(first, last, dtype=np.uint8)[:, None, None, None], (last - first, 2, 3, 3))


def shown(pixels: NDArray[np.uint8]) -> list[int]:
    assert bool((pixels == pixels[:, :1, :1, :1]).all())
    return pixels[:, 0, 0, 0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("max_in_memory", [0, 4 * FRAME_BYTES, 10**6])
def test_frames_are_whole_wherever_they_are(max_in_memory: int, cache: Path) -> None:
    store = FrameStore(max_in_memory)
    views = [store.put(3 * index, frames(3 * index, 3 * index + 3)) for index in range(4)]
    assert [shown(view) for view in views[1:]] == [[3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert shown(store.joined()) == list(range(12))
    assert (store.num_bytes_in_memory == 0) == (max_in_memory < 10**6)
    assert cache.exists() == (max_in_memory < 10**6)
    # The file has no name.
    assert not cache.exists() or list(cache.iterdir()) == []


@pytest.mark.parametrize("max_in_memory", [0, 3 * FRAME_BYTES, 10**6])
def test_later_frames_replace_earlier_ones(max_in_memory: int) -> None:
    store = FrameStore(max_in_memory)
    store.put(0, frames(0, 5))
    store.put(2, frames(20, 23))
    store.put(5, frames(5, 6))
    assert shown(store.joined()) == [0, 1, 20, 21, 22, 5]
    store.put(0, frames(7, 8))
    assert shown(store.joined()) == [7]


def test_joining_copies_nothing() -> None:
    store = FrameStore()
    views = [store.put(3 * index, frames(3 * index, 3 * index + 3)) for index in range(4)]
    assert all(np.shares_memory(store.joined(), view) for view in views)


def test_frames_that_there_is_no_room_for_are_joined_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgld.engine.frames.MAX_IN_MEMORY", 4 * FRAME_BYTES)
    store = FrameStore(10**6)
    for index in range(4):
        store.put(3 * index, frames(3 * index, 3 * index + 3))
    store.put(7, frames(20, 22))
    assert shown(store.joined()) == [*range(7), 20, 21]


def test_what_was_put_may_change_afterwards() -> None:
    for store in (FrameStore(), FrameStore(0)):
        given = frames(1, 3).copy()
        store.put(0, given)
        given[:] = 0
        assert shown(store.joined()) == [1, 2]


def test_result_outlives_its_store() -> None:
    store = FrameStore(0)
    store.put(0, frames(0, 3))
    joined = store.joined()
    del store
    assert shown(joined) == [0, 1, 2]


def test_without_a_place_for_files_frames_stay_in_memory(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("no folder")
    store = FrameStore(0)
    with caplog.at_level(logging.WARNING):
        store.put(0, frames(0, 2))
        store.put(2, frames(2, 4))
    assert shown(store.joined()) == [0, 1, 2, 3]
    assert [record.message for record in caplog.records if "stay in memory" in record.message][1:] == []
    assert "stay in memory" in caplog.text


class FullDisk:
    """A file that takes the first frame only."""

    def __init__(self, file: object) -> None:
        self._file = file
        self._num_writes = 0

    def write(self, content: bytes) -> int:
        self._num_writes += 1
        if self._num_writes > 1:
            raise OSError(28, "No space left on device")
        return self._file.write(content)  # type: ignore[attr-defined, no-any-return]

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


def test_where_the_disk_is_full_the_rest_stays_in_memory() -> None:
    store = FrameStore(0)
    store.put(0, frames(0, 1))
    store._file = FullDisk(store._file)  # type: ignore[assignment]
    store.put(1, frames(1, 2))
    store.put(2, frames(2, 3))
    store.put(3, frames(3, 4))
    assert shown(store.joined()) == [0, 1, 2, 3]
