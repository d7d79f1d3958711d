import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sgld.errors import Cancelled, ChannelClosed
from sgld.ipc.tensor_queue import TensorReader, TensorWriter, tensor_queue
from sgld.messages import TensorRef

SPAWN = multiprocessing.get_context("spawn")
TIMEOUT_S = 60
NUM_SLOTS, SLOT_BYTES = 6, 4096


@pytest.fixture
def sides() -> Iterator[tuple[TensorReader, TensorWriter]]:
    reader, writer = tensor_queue(num_slots=NUM_SLOTS, slot_bytes=SLOT_BYTES)
    yield reader, writer
    reader.close()
    writer.close()


def pixels_of(size: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def put_many(writer: TensorWriter, refs: "Connection[object, object]", num_tensors: int) -> None:
    """A rank that writes tensor i of seed i and sends its ref."""
    for i in range(num_tensors):
        refs.send(writer.put(pixels_of((i % 3 + 1) * SLOT_BYTES - i, seed=i)))


class Waiting(threading.Thread):
    """A thread that puts; `has_asked` is set once it waits for slots."""

    def __init__(self, writer: TensorWriter, size: int) -> None:
        super().__init__(daemon=True)
        self.writer = writer
        self.size = size
        self.has_asked = threading.Event()
        self.should_stop = False
        self.ref: TensorRef | None = None
        self.error: BaseException | None = None

    def ask(self) -> bool:
        self.has_asked.set()
        return self.should_stop

    def run(self) -> None:
        try:
            self.ref = self.writer.put(pixels_of(self.size), should_stop=self.ask)
        except BaseException as error:  # noqa: BLE001 - handed to the test
            self.error = error


def num_open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def num_mapped_queues() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:sgld-tensor-queue")


@pytest.mark.parametrize("shape", [(5, 7, 3), (1,), (), (0, 8, 8, 3), (SLOT_BYTES,), (3, SLOT_BYTES), (2, 1, 4097)])
def test_tensor_comes_back(sides: tuple[TensorReader, TensorWriter], shape: tuple[int, ...]) -> None:
    reader, writer = sides
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    ref = writer.put(np.asarray(pixels))
    with reader.borrowed(ref) as view:
        np.testing.assert_array_equal(view, pixels)
        assert not view.flags.writeable
    assert reader.statistics().num_free == NUM_SLOTS


def test_array_of_any_strides_is_written_in_c_order(sides: tuple[TensorReader, TensorWriter]) -> None:
    reader, writer = sides
    pixels = pixels_of(60).reshape(3, 4, 5).transpose(2, 0, 1)[::-1]
    np.testing.assert_array_equal(reader.view(writer.put(pixels)), pixels)


def test_torch_tensor_is_taken(sides: tuple[TensorReader, TensorWriter]) -> None:
    import torch

    reader, writer = sides
    pixels = torch.from_numpy(pixels_of(2 * SLOT_BYTES + 6)).reshape(2, -1).T
    np.testing.assert_array_equal(reader.view(writer.put(pixels)), pixels.numpy())


def test_pin_does_nothing_without_cuda(sides: tuple[TensorReader, TensorWriter]) -> None:
    import torch

    reader, writer = sides
    assert writer.pin() == torch.cuda.is_available()
    assert reader.statistics().num_free == NUM_SLOTS


def test_spawned_rank_writes_and_waits_for_releases() -> None:
    reader, writer = tensor_queue(num_slots=NUM_SLOTS, slot_bytes=SLOT_BYTES)
    refs, theirs = SPAWN.Pipe(duplex=False)
    num_tensors = 40
    process = SPAWN.Process(target=put_many, args=(writer, theirs, num_tensors))
    process.start()
    writer.close()
    theirs.close()
    for i in range(num_tensors):
        with reader.borrowed(refs.recv()) as view:
            np.testing.assert_array_equal(view, pixels_of((i % 3 + 1) * SLOT_BYTES - i, seed=i))
    process.join(TIMEOUT_S)
    assert process.exitcode == 0
    assert reader.statistics().num_free == NUM_SLOTS
    refs.close()
    reader.close()


def test_views_outlive_a_killed_rank_and_the_queue() -> None:
    reader, writer = tensor_queue(num_slots=NUM_SLOTS, slot_bytes=SLOT_BYTES)
    refs, theirs = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=put_many, args=(writer, theirs, NUM_SLOTS * 3))
    process.start()
    writer.close()
    theirs.close()
    ref = refs.recv()
    view = reader.view(ref)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(TIMEOUT_S)
    reader.close()
    np.testing.assert_array_equal(view, pixels_of(SLOT_BYTES, seed=0))
    reader.release(ref)
    refs.close()


def test_writer_waits_until_enough_slots_are_released(sides: tuple[TensorReader, TensorWriter]) -> None:
    reader, writer = sides
    refs = [writer.put(pixels_of(SLOT_BYTES)) for _ in range(NUM_SLOTS)]
    waiting = Waiting(writer, 2 * SLOT_BYTES)
    waiting.start()
    assert waiting.has_asked.wait(TIMEOUT_S)
    reader.release(refs[0])
    waiting.has_asked.clear()
    assert waiting.has_asked.wait(TIMEOUT_S), "one slot isn't enough"
    reader.release(refs[3])
    waiting.join(TIMEOUT_S)
    assert waiting.ref is not None
    assert waiting.ref.slots == (0, 3)
    np.testing.assert_array_equal(reader.view(waiting.ref), pixels_of(2 * SLOT_BYTES))


def test_writer_that_gives_up_gives_back_what_it_had(sides: tuple[TensorReader, TensorWriter]) -> None:
    reader, writer = sides
    refs = [writer.put(pixels_of(SLOT_BYTES)) for _ in range(NUM_SLOTS - 1)]
    with pytest.raises(Cancelled):
        writer.put(pixels_of(2 * SLOT_BYTES), should_stop=lambda: True)
    # The slot it had got is there for the next.
    assert writer.put(pixels_of(1)).slots == (NUM_SLOTS - 1,)
    reader.release(refs[2])
    assert writer.put(pixels_of(1)).slots == (2,)


def test_waiting_writers_stop_when_told(sides: tuple[TensorReader, TensorWriter]) -> None:
    reader, writer = sides
    refs = [writer.put(pixels_of(SLOT_BYTES)) for _ in range(NUM_SLOTS)]
    # The first waits for slots, the second for the first.
    writers = [Waiting(writer, 3 * SLOT_BYTES) for _ in range(2)]
    for waiting in writers:
        waiting.start()
        assert waiting.has_asked.wait(TIMEOUT_S)
    for waiting in writers:
        waiting.should_stop = True
        waiting.join(TIMEOUT_S)
        assert isinstance(waiting.error, Cancelled)
    for ref in refs:
        reader.release(ref)
    assert len(writer.put(pixels_of(3 * SLOT_BYTES)).slots) == 3


def test_consecutive_slots_are_preferred_and_not_copied(sides: tuple[TensorReader, TensorWriter]) -> None:
    reader, writer = sides
    refs = [writer.put(pixels_of(SLOT_BYTES)) for _ in range(NUM_SLOTS)]
    for i in (0, 2, 4, 5):
        reader.release(refs[i])
    ref = writer.put(pixels_of(2 * SLOT_BYTES))
    assert ref.slots == (4, 5)
    assert np.shares_memory(reader.view(ref), reader.view(ref))


def test_scattered_slots_are_gathered(sides: tuple[TensorReader, TensorWriter]) -> None:
    reader, writer = sides
    refs = [writer.put(pixels_of(SLOT_BYTES)) for _ in range(NUM_SLOTS)]
    for i in (4, 0, 1):
        reader.release(refs[i])
    pixels = pixels_of(2 * SLOT_BYTES + 10, seed=3)
    ref = writer.put(pixels)
    assert ref.slots == (0, 1, 4)
    view = reader.view(ref)
    np.testing.assert_array_equal(view, pixels)
    assert not view.flags.writeable
    reader.release(ref)
    assert reader.statistics().num_free == 3


def test_too_large_or_other_tensors_are_refused(sides: tuple[TensorReader, TensorWriter]) -> None:
    reader, writer = sides
    assert writer.max_bytes == 3 * SLOT_BYTES
    with pytest.raises(ValueError, match=f"{writer.max_bytes + 1} bytes.*limit of {writer.max_bytes}"):
        writer.put(pixels_of(writer.max_bytes + 1))
    with pytest.raises(ValueError, match="float32"):
        writer.put(np.zeros(3, np.float32))
    assert reader.statistics().num_free == NUM_SLOTS


def test_release_of_free_slots_is_a_bug(sides: tuple[TensorReader, TensorWriter]) -> None:
    reader, writer = sides
    ref = writer.put(pixels_of(10))
    reader.release(ref)
    with pytest.raises(AssertionError):
        reader.release(ref)


def test_many_writers_never_share_a_slot(sides: tuple[TensorReader, TensorWriter]) -> None:
    reader, writer = sides
    written: list[tuple[int, TensorRef]] = []
    has_written = threading.Semaphore(0)

    def put_some(seed: int) -> None:
        for i in range(20):
            written.append((seed + i, writer.put(pixels_of((i % 3 + 1) * SLOT_BYTES, seed + i))))
            has_written.release()

    threads = [threading.Thread(target=put_some, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(4 * 20):
        assert has_written.acquire(timeout=TIMEOUT_S)
        seed, ref = written.pop(-1)
        with reader.borrowed(ref) as view:
            np.testing.assert_array_equal(view, pixels_of(view.size, seed))
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert reader.statistics().num_free == NUM_SLOTS


def test_failed_copy_gives_its_slots_back(
    sides: tuple[TensorReader, TensorWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = sides

    def fail(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("sgld.ipc.tensor_queue._copy", fail)
    with pytest.raises(MemoryError):
        writer.put(pixels_of(SLOT_BYTES))
    assert reader.statistics().num_free == NUM_SLOTS


def test_closed_queue_refuses(sides: tuple[TensorReader, TensorWriter]) -> None:
    reader, writer = sides
    ref = writer.put(pixels_of(10))
    reader.close()
    writer.close()
    reader.close()
    writer.close()
    reader.release(ref)
    for operation in (lambda: reader.view(ref), reader.statistics, lambda: writer.put(pixels_of(1))):
        with pytest.raises(ChannelClosed):
            operation()


def test_close_leaves_no_descriptor_or_mapping() -> None:
    num_before, num_mapped_before = num_open_fds(), num_mapped_queues()
    reader, writer = tensor_queue(num_slots=NUM_SLOTS, slot_bytes=SLOT_BYTES)
    view = reader.view(writer.put(pixels_of(10)))
    reader.close()
    writer.close()
    del view
    assert num_open_fds() == num_before
    assert num_mapped_queues() <= num_mapped_before


def test_writer_is_only_pickled_while_spawning(sides: tuple[TensorReader, TensorWriter]) -> None:
    import pickle

    with pytest.raises(RuntimeError, match="inheritance"):
        pickle.dumps(sides[1])
