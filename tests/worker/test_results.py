import threading
from collections.abc import Iterator
from typing import Any

import anyio
import numpy as np
import pytest
import torch

from sgld.errors import ChannelClosed, PipelineFailed
from sgld.ipc.channel import FrontEnd, channel_pair
from sgld.ipc.tensor_queue import TensorReader, TensorWriter, tensor_queue
from sgld.messages import AnyCommand, AnyReply, Decoded, Finished, Previewed
from sgld.worker.results import MAX_WAITING, Results

SLOT_BYTES = 48
FRAME = (2, 4, 3)


class Front:
    """The front process, which reads when it is told to."""

    def __init__(self, channel: FrontEnd[AnyCommand, AnyReply], tensors: TensorReader) -> None:
        self.channel = channel
        self.tensors = tensors

    def receive(self) -> AnyReply:
        async def next_message() -> AnyReply:
            with anyio.fail_after(60):
                return await self.channel.receive()

        return anyio.run(next_message)

    def pixels(self, message: Previewed | Decoded) -> Any:
        shown = np.array(self.tensors.view(message.pixels))
        self.tensors.release(message.pixels)
        return shown


@pytest.fixture
def ends() -> Iterator[tuple[Results, Front, TensorWriter]]:
    front, rank = channel_pair()
    reader, writer = tensor_queue(num_slots=4, slot_bytes=SLOT_BYTES)
    results = Results(rank, writer)
    yield results, Front(front, reader), writer
    front.close()
    results.close()
    rank.close()
    reader.close()
    writer.close()


Ends = tuple[Results, Front, TensorWriter]


def frames(count: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, *FRAME)


def test_messages_and_pixels_keep_their_order(ends: Ends) -> None:
    results, front, _ = ends
    results.preview("a", 2, np.full((1, 2, 3), 7, np.uint8))
    results.frames("a", 0, frames(1), is_video=False)
    results.message(Finished(request_id="a"))
    results.frames("b", 4, frames(2), is_video=True)

    preview = front.receive()
    assert isinstance(preview, Previewed)
    assert (preview.request_id, preview.step, front.pixels(preview).tolist()) == ("a", 2, [[[7] * 3] * 2])
    decoded = front.receive()
    assert isinstance(decoded, Decoded)
    assert (decoded.request_id, decoded.index, decoded.is_video) == ("a", 0, False)
    assert front.pixels(decoded).shape == (1, *FRAME)
    assert front.receive() == Finished(request_id="a")
    video = front.receive()
    assert isinstance(video, Decoded)
    assert (video.request_id, video.index, video.is_video) == ("b", 4, True)


def test_more_frames_than_the_queue_takes_are_split(ends: Ends) -> None:
    results, front, writer = ends
    per_piece = writer.max_bytes // frames(1).numel()
    count = 3 * per_piece + 1
    results.frames("a", 10, frames(count), is_video=True)
    results.message(Finished(request_id="a"))

    pieces = []
    while isinstance(message := front.receive(), Decoded):
        pieces.append((message.index, front.pixels(message)))

    assert [index for index, _ in pieces] == [10 + per_piece * i for i in range(4)]
    assert np.concatenate([piece for _, piece in pieces])[:, 0, 0, 0].tolist() == list(range(count))
    assert message == Finished(request_id="a")


def test_slow_front_does_not_hold_up_who_gives(ends: Ends) -> None:
    results, front, _ = ends
    for index in range(30):
        results.frames("a", index, frames(1, index), is_video=True)
    for index in range(30):
        message = front.receive()
        assert isinstance(message, Decoded)
        assert (message.index, int(front.pixels(message)[0, 0, 0, 0])) == (index, index)


def in_time(action: Any) -> bool:
    """Whether an action comes to its end in another thread."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(timeout=20)
    return not thread.is_alive()


def test_what_can_not_be_sent_ends_the_rank_and_says_why() -> None:
    front_end, rank = channel_pair()
    reader, writer = tensor_queue(num_slots=4, slot_bytes=SLOT_BYTES)
    results, front = Results(rank, writer), Front(front_end, reader)
    results.message(Finished(request_id="before"))
    results.preview("a", 1, np.zeros((1, 2, 3), np.float32))

    def give() -> None:
        for index in range(3 * MAX_WAITING):
            results.message(Finished(request_id=str(index)))

    assert front.receive() == Finished(request_id="before")
    with pytest.raises(ChannelClosed):
        front.receive()
    # Whoever waits for commands hears of it.
    with pytest.raises(ChannelClosed):
        rank.receive(20)
    assert in_time(give)
    with pytest.raises(ValueError, match="takes uint8, got float32"):
        results.close()
    front_end.close()
    for end in (rank, reader, writer):
        end.close()


def test_front_that_is_gone_blocks_nobody(ends: Ends) -> None:
    results, front, _ = ends
    front.channel.close()

    def give() -> None:
        for index in range(3 * MAX_WAITING):
            results.message(Finished(request_id=str(index)))

    assert in_time(give)
    assert in_time(results.close)


def test_front_that_is_gone_with_a_full_tensor_queue_blocks_nobody(ends: Ends) -> None:
    """Its slots are never released."""
    results, front, _ = ends

    def give() -> None:
        for index in range(3 * MAX_WAITING):
            results.frames("a", index, frames(2), is_video=True)

    giving = threading.Thread(target=give, daemon=True)
    giving.start()
    for _ in range(4):  # as many as there are slots
        front.receive()
    front.channel.close()
    giving.join(timeout=20)
    assert not giving.is_alive()
    assert in_time(results.close)


def test_pixels_that_the_queue_refuses_do_not_stop_the_rest(ends: Ends) -> None:
    results, front, writer = ends
    too_large = torch.zeros(1, writer.max_bytes, 1, 3, dtype=torch.uint8)
    with pytest.raises(PipelineFailed, match="a frame takes 288 bytes, 96 is the limit"):
        results.frames("a", 0, too_large, is_video=True)
    results.message(Finished(request_id="b"))
    assert front.receive() == Finished(request_id="b")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_picture_on_a_gpu_does_not_wait_for_what_is_launched_after_it(ends: Ends) -> None:
    results, front, _ = ends
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    results.preview("a", 1, torch.full((1, 2, 3), 6, dtype=torch.uint8, device="cuda"))
    front.pixels(received(front))  # the first copy takes longer
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    results.preview("a", 2, torch.full((1, 2, 3), 7, dtype=torch.uint8, device="cuda"))
    for _ in range(500):
        x @ x
    done.record()
    assert front.pixels(received(front)).tolist() == [[[7] * 3] * 2]
    assert not done.query()  # type: ignore[no-untyped-call]


def received(front: Front) -> Previewed:
    message = front.receive()
    assert isinstance(message, Previewed)
    return message
