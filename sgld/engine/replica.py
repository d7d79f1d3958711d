"""The front's handle of a rank: it starts the process, talks to it, and sees when it dies or hangs."""

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from multiprocessing.connection import wait
from typing import Any, Protocol

import anyio
from anyio import to_thread

from sgld.config import EngineConfig
from sgld.errors import ChannelClosed, RankLost
from sgld.ipc.channel import ChannelStatistics, FrontEnd, RankEnd, channel_pair
from sgld.ipc.seats import Seat, seats
from sgld.ipc.tensor_queue import TensorQueueStatistics, TensorReader, TensorWriter, tensor_queue
from sgld.messages import AnyCommand, AnyReply, Exit
from sgld.outcome import on_failure
from sgld.worker.main import Variable, follower_main, rank_environment, rank_main

logger = logging.getLogger(__name__)
# A rank that was told to leave ends its tasks at their next call; after this time it is killed.
EXIT_GRACE_S = 2.0
_KILLED_GRACE_S = 5.0
# How often a silent rank is looked at: it is found to hang this much too late at worst.
_LOOK_S = 0.5
# Replicas are started by several threads, and the environment is one for all.
_environment = threading.Lock()


class Rank:
    """Rank 0 of a replica, wherever it runs.

    :param cause_of_death: how the process ended; None if it still lives after so many seconds.
    """

    def __init__(
        self,
        front: FrontEnd[AnyCommand, AnyReply],
        tensors: TensorReader,
        cause_of_death: Callable[[float], str | None] = lambda timeout_s: None,
    ) -> None:
        self.tensors = tensors
        self._front = front
        self._cause_of_death = cause_of_death
        self._silence_s = 0.0
        self._limit_s: float | None = None

    def send(self, command: AnyCommand) -> None:
        """Send a command; never waits.

        :raises RankLost: the rank is gone.
        """
        try:
            self._front.send_nowait(command)
        except ChannelClosed as error:
            raise RankLost(str(error)) from None

    def expect_reply(self, limit_s: float | None) -> None:
        """From now on a silence longer than this means that the rank hangs; None: it may be silent."""
        if limit_s != self._limit_s:
            self._silence_s = 0.0
        self._limit_s = limit_s

    async def receive(self) -> AnyReply:
        """Wait for the next reply.

        :raises RankLost: the rank is gone, or hangs.
        """
        while True:
            with anyio.move_on_after(_LOOK_S):
                try:
                    reply = await self._front.receive()
                except ChannelClosed:
                    raise RankLost(f"the rank process died{await self._how()}") from None
                self._silence_s = 0.0
                return reply
            # Its end of the channel may outlive a process, in the hands of its children.
            if (cause := self._cause_of_death(0)) is not None:
                raise RankLost(f"the rank process died ({cause})")
            # Counted in looks: while both processes were suspended nobody was silent.
            self._silence_s += _LOOK_S
            if self._limit_s is not None and self._silence_s > self._limit_s:
                raise RankLost(f"the rank process hangs: it was silent for {self._silence_s:.0f} s")

    def receive_nowait(self) -> AnyReply | None:
        """A reply that is there already; None if there is none, or the rank is gone: `receive` says so."""
        try:
            return self._front.receive_nowait()
        except (anyio.WouldBlock, ChannelClosed):
            return None

    def statistics(self) -> tuple[TensorQueueStatistics, ChannelStatistics]:
        """How full the queues to and from the rank are."""
        return self.tensors.statistics(), self._front.statistics()

    async def _how(self) -> str:
        """How the process ended, in parentheses; it closed its end a moment before."""
        cause = await to_thread.run_sync(self._cause_of_death, _LOOK_S)
        return f" ({cause})" if cause else ""


RankFactory = Callable[[EngineConfig, int], AbstractAsyncContextManager[Rank]]
"""Starts the rank of the replica with an index."""


class _Process(Protocol):
    """What is needed of multiprocessing's process."""

    @property
    def sentinel(self) -> int: ...
    @property
    def exitcode(self) -> int | None: ...
    def kill(self) -> None: ...
    def join(self, timeout: float | None = None) -> None: ...
    def close(self) -> None: ...


# Not torch's: nothing of it goes to a rank, and importing it would keep the rank waiting.
_Spawned = multiprocessing.get_context("spawn").Process


@asynccontextmanager
async def rank_process(
    config: EngineConfig,
    replica: int = 0,
    *,
    niceness: int = 0,
    set_up: Callable[[], None] | None = None,
    process: Callable[..., Any] = _Spawned,
) -> AsyncIterator[Rank]:
    """A rank in a process of its own, and its followers; when the block ends nothing of them is left.

    :param replica: index of its replica, which has GPUs of its own.
    :param niceness: of a rank that runs on the CPU.
    :param set_up: called in each process before it loads anything; says how it logs.
    :param process: makes a process that isn't started, of what multiprocessing's has: target, args and name.
    """
    front, rank_end = channel_pair()
    reader, writer = tensor_queue()
    meeting = os.memfd_create("sgld-ranks")
    try:
        args = (rank_end, writer, (config, niceness, set_up), replica, f"/proc/{os.getpid()}/fd/{meeting}", process)
        processes = await to_thread.run_sync(_start, *args)
        try:
            async with _flushing(front):
                yield Rank(front, reader, functools.partial(_first_death, processes))
        finally:
            with anyio.CancelScope(shield=True):
                await _end(front, processes)
    finally:
        # Where it wasn't even started, all of them are open.
        for end in (front, reader, rank_end, writer):
            end.close()
        os.close(meeting)


def _start(
    rank_end: RankEnd[AnyReply, AnyCommand],
    writer: TensorWriter,
    common: tuple[EngineConfig, int, Callable[[], None] | None],
    replica: int,
    meeting: str,
    process: Callable[..., Any],
) -> list[Any]:
    """Start the processes, in a thread, as each is given what it needs through a pipe.

    They are no daemons: those may not have children, and loaders may use them. They watch their parent instead.

    :param common: what all of them are given: the config, their niceness, and what sets them up.
    :param meeting: an empty file, by which they find each other.
    """
    config, *_ = common
    environment = rank_environment(config, replica)
    of = "" if replica == 0 else f"-of-replica-{replica}"
    processes: list[Any] = []

    def start(seat: Seat, target: Callable[..., None], *args: Any) -> None:
        rank = process(target=target, args=(*args, *common, seat), name=f"sgld-rank-{seat.index}{of}")
        with _inherited(environment):
            rank.start()
        processes.append(rank)

    def kill() -> None:
        for started in processes:
            started.kill()

    with on_failure(kill), seats(config.parallel.num_ranks, meeting) as (seat, *others):
        start(seat, rank_main, rank_end, writer)
        for other in others:
            start(other, follower_main)
    rank_end.close()
    writer.close()
    return processes


def refuse_unguarded_spawn() -> None:
    """A spawned process imports the main script again; without a guard that would start another engine."""
    if getattr(multiprocessing.process.current_process(), "_inheriting", False):
        sys.exit("sgld: a script that starts an engine needs `if __name__ == '__main__':` around its main part")


@contextmanager
def _inherited(variables: Sequence[Variable]) -> Iterator[None]:
    """While the block runs, new processes have these variables in the place of those that this one has.

    So have those that others start meanwhile, in this process: of its GPUs they see those of a replica.
    """
    with _environment:
        for variable in variables:
            os.putenv(variable.name, variable.ours)
        try:
            yield
        finally:
            for variable in variables:
                if variable.given is None:
                    os.unsetenv(variable.name)
                else:
                    os.putenv(variable.name, variable.given)


@asynccontextmanager
async def _flushing(front: FrontEnd[AnyCommand, AnyReply]) -> AsyncIterator[None]:
    async def flush() -> None:
        # The death of the rank shows where its replies are awaited.
        with contextlib.suppress(ChannelClosed):
            await front.flush_forever()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(flush)
        try:
            yield
        finally:
            tasks.cancel_scope.cancel()


def _first_death(processes: Sequence[_Process], timeout_s: float) -> str | None:
    """How one of the processes of a replica ended; None if all still live after `timeout_s`.

    Where one is killed the others leave by themselves.
    """
    causes = {index: cause for index, process in enumerate(processes) if (cause := _cause_of_death(process, 0))}
    if causes:
        index = min(causes, key=lambda index: (processes[index].exitcode or 0) >= 0)
        return causes[index] if len(processes) == 1 else f"rank {index}: {causes[index]}"
    if timeout_s:
        ended = wait([process.sentinel for process in processes], timeout_s)
        for process in processes:
            # Its pipes are closed a moment before it can be reaped.
            if process.sentinel in ended:
                process.join(timeout_s)
        return _first_death(processes, 0)
    return None


def _cause_of_death(process: _Process, timeout_s: float) -> str | None:
    """How a process ended; None if it still lives after `timeout_s`."""
    process.join(timeout_s)
    code = process.exitcode
    if code is None:
        return None
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


async def _end(front: FrontEnd[AnyCommand, AnyReply], processes: Sequence[_Process]) -> None:
    """Ask rank 0 to leave, which the others follow; kill those that don't, and reap all."""
    with contextlib.suppress(ChannelClosed, anyio.WouldBlock):
        front.send_nowait(Exit())
    with anyio.move_on_after(EXIT_GRACE_S):
        for process in processes:
            await anyio.wait_readable(process.sentinel)
    for process in processes:
        if process.exitcode is None:
            process.kill()
    front.close()
    for process in processes:
        await to_thread.run_sync(process.join, _KILLED_GRACE_S)
        if process.exitcode is None:
            logger.warning("a rank process still hasn't ended %.0f s after it was killed", _KILLED_GRACE_S)
        else:
            process.close()
