import multiprocessing
import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from blockbuster import blockbuster_ctx

from sgld.errors import ChannelClosed
from sgld.ipc.channel import FrontEnd, RankEnd, channel_pair
from sgld.messages import MAX_MESSAGE_BYTES, AnyCommand, AnyReply, Cancel, Exit, Finished, Ran, Run, Start
from sgld.sampling_params import SamplingParams

Front = FrontEnd[AnyCommand, AnyReply]
Rank = RankEnd[AnyReply, AnyCommand]
SPAWN = multiprocessing.get_context("spawn")
TIMEOUT_S = 60


@pytest.fixture
def ends() -> Iterator[tuple[Front, Rank]]:
    front, rank = channel_pair(max_outgoing=4)
    yield front, rank
    front.close()
    rank.close()


def echo(rank: Rank) -> None:
    """A rank that answers each Cancel with Finished until Exit."""
    while True:
        match rank.receive(TIMEOUT_S):
            case Cancel(request_id=request_id):
                rank.send(Finished(request_id=request_id))
            case _:
                return


def send_then_wait(rank: Rank) -> None:
    rank.send(Finished(request_id="last words"))
    rank.receive(TIMEOUT_S)


async def test_messages_sent_together_come_one_by_one_and_in_order(ends: tuple[Front, Rank]) -> None:
    front, rank = ends
    names = [str(number) for number in range(5)]
    rank.send_all([Finished(request_id=name) for name in names[:3]])
    rank.send_all([Finished(request_id=name) for name in names[3:]])
    assert [await front.receive() for _ in names] == [Finished(request_id=name) for name in names]
    with pytest.raises(anyio.WouldBlock):
        front.receive_nowait()


async def test_messages_that_are_too_large_together_are_sent_apart(ends: tuple[Front, Rank]) -> None:
    front, rank = ends
    sent = [Finished(request_id=name * (MAX_MESSAGE_BYTES // 2)) for name in "ab"]
    rank.send_all(sent)
    assert [front.receive_nowait(), front.receive_nowait()] == sent


def large_command() -> Cancel:
    return Cancel(request_id="x" * (MAX_MESSAGE_BYTES - 100))


def fill(front: Front) -> int:
    """Send until the outgoing queue is full; the number of messages taken."""
    num_sent = 0
    while True:
        try:
            front.send_nowait(large_command())
        except anyio.WouldBlock:
            return num_sent
        num_sent += 1


def num_open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_messages_arrive_in_order_and_typed(ends: tuple[Front, Rank]) -> None:
    front, rank = ends
    commands: list[AnyCommand] = [
        Start(request_id="a", params=SamplingParams(prompt="ein Bär 🐻", diffusers_kwargs={"eta": 0.5})),
        Run(call_ids=(1, 2), num_ticks=3),
        Exit(),
    ]
    for command in commands:
        front.send_nowait(command)
    assert [rank.receive(TIMEOUT_S) for _ in commands] == commands
    reply = Ran(call_ids=(1, 2), cost_key="k", rows=2, elapsed_s=0.5, is_timed=True)
    rank.send(reply)
    assert await front.receive() == reply


async def test_spawned_rank_answers() -> None:
    front, rank = channel_pair()
    process = SPAWN.Process(target=echo, args=(rank,))
    process.start()
    rank.close()
    for i in range(100):
        front.send_nowait(Cancel(request_id=str(i)))
    with anyio.fail_after(TIMEOUT_S):
        replies = [await front.receive() for _ in range(100)]
    assert replies == [Finished(request_id=str(i)) for i in range(100)]
    front.send_nowait(Exit())
    await anyio.to_thread.run_sync(process.join)
    assert process.exitcode == 0
    front.close()


async def test_killed_rank_closes_the_channel_after_its_last_words() -> None:
    front, rank = channel_pair()
    process = SPAWN.Process(target=send_then_wait, args=(rank,))
    process.start()
    rank.close()
    with anyio.fail_after(TIMEOUT_S):
        assert await front.receive() == Finished(request_id="last words")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(expect_closed, front)
            await anyio.lowlevel.checkpoint()
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
    await anyio.to_thread.run_sync(process.join)
    with pytest.raises(ChannelClosed, match="is gone"):
        front.send_nowait(Exit())
    front.close()


async def expect_closed(front: Front) -> None:
    with pytest.raises(ChannelClosed):
        await front.receive()


async def test_last_words_of_a_rank_that_left_commands_unread_are_received(ends: tuple[Front, Rank]) -> None:
    front, rank = ends
    front.send_nowait(Exit())
    rank.send(Finished(request_id="a"))
    rank.close()
    assert await front.receive() == Finished(request_id="a")
    await expect_closed(front)


def test_rank_sees_that_the_front_is_gone(ends: tuple[Front, Rank]) -> None:
    front, rank = ends
    front.send_nowait(Exit())
    front.close()
    assert rank.is_readable()
    assert rank.receive(None) == Exit()
    assert rank.is_readable()
    with pytest.raises(ChannelClosed, match="closed it or died"):
        rank.receive(None)
    with pytest.raises(ChannelClosed, match="is gone"):
        rank.send(Finished(request_id="a"))


def test_rank_receive_times_out(ends: tuple[Front, Rank]) -> None:
    front, rank = ends
    assert not rank.is_readable()
    assert rank.receive(0) is None
    front.send_nowait(Exit())
    assert rank.is_readable()
    assert rank.receive(0) == Exit()


def test_rank_send_blocks_until_the_front_reads(ends: tuple[Front, Rank]) -> None:
    front, rank = ends
    num_messages = 200

    def send_all() -> None:
        for _ in range(num_messages):
            rank.send(Finished(request_id="x" * 60_000))

    writer = threading.Thread(target=send_all)
    writer.start()
    # The writer has filled the socket and waits once it isn't writable.
    poll = select.poll()
    poll.register(rank.fileno(), select.POLLOUT)
    while poll.poll(0):
        pass
    assert writer.is_alive()
    num_received = 0
    while num_received < num_messages:
        try:
            front.receive_nowait()
        except anyio.WouldBlock:
            continue
        num_received += 1
    writer.join(TIMEOUT_S)
    assert not writer.is_alive()


async def test_messages_of_several_threads_stay_whole(ends: tuple[Front, Rank]) -> None:
    front, rank = ends
    names = ["a" * 1000, "b" * 30_000, "c" * 60_000]

    def send_many(name: str) -> None:
        for _ in range(30):
            rank.send(Finished(request_id=name))

    threads = [threading.Thread(target=send_many, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    replies = [await front.receive() for _ in range(90)]
    for name in names:
        assert replies.count(Finished(request_id=name)) == 30
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("num_bytes", [MAX_MESSAGE_BYTES, 10 * MAX_MESSAGE_BYTES])
def test_too_large_message_is_refused(ends: tuple[Front, Rank], num_bytes: int) -> None:
    front, rank = ends
    with pytest.raises(ValueError, match=rf"Cancel message takes \d+ bytes, the limit is {MAX_MESSAGE_BYTES}"):
        front.send_nowait(Cancel(request_id="x" * num_bytes))
    with pytest.raises(ValueError, match="tensor queue"):
        rank.send(Finished(request_id="x" * num_bytes))


def test_outgoing_queue_is_bounded(ends: tuple[Front, Rank]) -> None:
    front, rank = ends
    num_sent = fill(front)
    assert front.statistics().num_outgoing == front.statistics().max_outgoing == 4
    assert num_sent > 4 + 2, "the socket itself holds several messages"
    assert rank.receive(0) is not None
    front.send_nowait(Exit())
    assert rank.receive(0) is not None


async def test_flush_sends_all_that_waits(ends: tuple[Front, Rank]) -> None:
    front, rank = ends
    num_sent = fill(front)
    received: list[object] = []

    def read_all() -> None:
        received.extend(rank.receive(TIMEOUT_S) for _ in range(num_sent))

    with blockbuster_ctx():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(front.flush)
            tasks.start_soon(front.flush)
            await anyio.to_thread.run_sync(read_all)
    assert received == [large_command()] * num_sent
    assert front.statistics().num_outgoing == 0


async def test_send_waits_for_room(ends: tuple[Front, Rank]) -> None:
    front, rank = ends
    num_sent = fill(front)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(front.send, Exit())
        received = [await anyio.to_thread.run_sync(rank.receive, TIMEOUT_S) for _ in range(num_sent + 1)]
    assert received[-1] == Exit()


async def test_flush_forever_sends_what_send_nowait_left(ends: tuple[Front, Rank]) -> None:
    front, rank = ends
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(front.flush_forever)
        for _ in range(3):
            num_sent = fill(front)
            for _ in range(num_sent):
                assert await anyio.to_thread.run_sync(rank.receive, TIMEOUT_S) == large_command()
        tasks.cancel_scope.cancel()


async def test_cancelled_receive_loses_no_message(ends: tuple[Front, Rank]) -> None:
    front, rank = ends
    received: list[AnyReply] = []

    async def receive_one() -> None:
        received.append(await front.receive())

    for i in range(50):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive_one)
            for _ in range(i % 5):
                await anyio.lowlevel.checkpoint()
            rank.send(Finished(request_id=str(i)))
            for _ in range(i % 7):
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
    rank.close()
    with pytest.raises(ChannelClosed):
        await receive_rest(front, received)
    assert received == [Finished(request_id=str(i)) for i in range(50)]


async def receive_rest(front: Front, received: list[AnyReply]) -> None:
    while True:
        received.append(await front.receive())


async def test_close_ends_waits(ends: tuple[Front, Rank]) -> None:
    front, _ = ends
    fill(front)

    async def expect_flush_closed() -> None:
        with pytest.raises(ChannelClosed, match="this end"):
            await front.flush_forever()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(expect_closed, front)
        tasks.start_soon(expect_flush_closed)
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        front.close()
    await expect_closed(front)
    with pytest.raises(ChannelClosed):
        front.send_nowait(Exit())


def test_closed_rank_end_refuses(ends: tuple[Front, Rank]) -> None:
    _, rank = ends
    rank.close()
    with pytest.raises(ChannelClosed):
        rank.receive(None)
    with pytest.raises(ChannelClosed):
        rank.send(Finished(request_id="a"))


def test_close_leaves_no_descriptor() -> None:
    num_before = num_open_fds()
    front, rank = channel_pair()
    front.close()
    front.close()
    rank.close()
    rank.close()
    assert num_open_fds() == num_before


def test_rank_end_is_only_pickled_while_spawning(ends: tuple[Front, Rank]) -> None:
    import pickle

    with pytest.raises(RuntimeError, match="inheritance"):
        pickle.dumps(ends[1])


def test_socket_keeps_message_boundaries() -> None:
    """What the channel relies on: a send is received whole, whatever follows it."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        left.send(b"ab")
        left.send(b"c")
        assert right.recv(100) == b"ab"
        assert right.recv(100) == b"c"
