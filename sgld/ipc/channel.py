"""Typed messages between the front process and rank 0 of a replica.

The channel is a pair of Unix sockets of type SOCK_SEQPACKET: one send is one message, so nothing is framed, and a
message arrives whole or not at all. `FrontEnd` is for an anyio event loop and never blocks it; `RankEnd` is for
threads, and may be handed to a process that is being spawned:

    front_end, rank_end = channel_pair()
    process = spawn.Process(target=main, args=(rank_end,))
    process.start()
    rank_end.close()  # else the front doesn't see the death of the process
"""

import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import assert_spawning
from typing import Any, Generic, Never, TypeVar

import anyio
from msgspec.msgpack import Decoder, Encoder

from sgld.errors import ChannelClosed
from sgld.messages import MAX_MESSAGE_BYTES, AnyCommand, AnyReply

SendT = TypeVar("SendT")
ReceiveT = TypeVar("ReceiveT")

# Several messages of the largest size: the kernel cuts this to net.core.wmem_max, 208 KiB by default, and counts each
# message with its own bookkeeping.
SOCKET_BUFFER_BYTES = 8 * MAX_MESSAGE_BYTES
MAX_OUTGOING_MESSAGES = 1024
_CLOSED = "this end of the channel was closed"


@dataclass(frozen=True)
class ChannelStatistics:
    """What waits in the front process to be sent; the socket's own buffer isn't counted."""

    num_outgoing: int
    max_outgoing: int


class RankEnd(Generic[SendT, ReceiveT]):
    """The rank's end: any thread may send, one thread at a time receives.

    It can be pickled only as an argument of a process that is being spawned.
    """

    def __init__(self, sock: socket.socket, decoder: Decoder[ReceiveT]) -> None:
        # Sends block; receives are made non-blocking one by one (MSG_DONTWAIT).
        sock.setblocking(True)
        self._socket = sock
        self._encoder = Encoder()
        self._decoder = decoder
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def send(self, message: SendT) -> None:
        """Send one message; blocks while the peer doesn't read.

        No deadline: a front that doesn't read is stopped or at its end, and its end closes the channel.

        :raises ChannelClosed: the peer is gone.
        :raises ValueError: the message is larger than MAX_MESSAGE_BYTES.
        """
        self._send(_encode(self._encoder, message))

    def send_all(self, messages: Sequence[SendT]) -> None:
        """Send messages in order, as one where they fit: the peer is woken once. Raises what `send` does."""
        if len(messages) > 1 and len(data := self._encoder.encode(messages)) <= MAX_MESSAGE_BYTES:
            self._send(data)
        else:
            for message in messages:
                self.send(message)

    def _send(self, data: bytes) -> None:
        # The kernel keeps messages whole, so threads need no lock among them.
        _translated(self._socket.send, data)

    def receive(self, timeout_s: float | None) -> ReceiveT | None:
        """The next message, or None if none came within `timeout_s` (None: waits for as long as the peer lives).

        :raises ChannelClosed: the peer is gone, and all it sent has been received.
        """
        if not self._wait_readable(timeout_s):
            return None
        return self._decoder.decode(_receive_bytes(self._socket, socket.MSG_DONTWAIT))

    def is_readable(self, timeout_s: float = 0.0) -> bool:
        """Whether `receive` would return or raise at once, now or within `timeout_s`."""
        return self._wait_readable(timeout_s)

    def fileno(self) -> int:
        """The descriptor, for a thread that waits for several things at once."""
        return self._socket.fileno()

    def shutdown(self) -> None:
        """End the connection: both ends find their peer gone, in all threads, those that wait, too."""
        with suppress(OSError):  # the peer may have done so before
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close this process's hold on the end; other threads have left it by now."""
        self._socket.close()

    def _wait_readable(self, timeout_s: float | None) -> bool:
        if self._socket.fileno() < 0:
            raise ChannelClosed(_CLOSED)
        return bool(self._poll.poll(None if timeout_s is None else timeout_s * 1000))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        assert_spawning(self)
        return _rebuild_rank_end, (self._socket, self._decoder.type)


class FrontEnd(Generic[SendT, ReceiveT]):
    """The front's end, for one anyio event loop: one task receives, any task sends.

    At most `max_outgoing` messages wait for the rank to read; then `send_nowait` refuses and `send` waits. A rank that
    is busy for long is normal, one that lets so many commands pile up is not.
    """

    def __init__(
        self,
        sock: socket.socket,
        decoder: Decoder[ReceiveT | list[ReceiveT]],
        *,
        max_outgoing: int = MAX_OUTGOING_MESSAGES,
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._encoder = Encoder()
        self._decoder = decoder
        self._received: deque[ReceiveT] = deque()
        """Those that came together and weren't asked for yet."""
        self._max_outgoing = max_outgoing
        self._outgoing: deque[bytes] = deque()
        self._has_outgoing = anyio.Event()
        self._flushing = anyio.Lock()
        self._num_waiting = 0

    def send_nowait(self, message: SendT) -> None:
        """Send one message, or keep it for `flush` if the socket is full.

        :raises anyio.WouldBlock: `max_outgoing` messages wait already.
        :raises ChannelClosed: the peer is gone, or this end was closed.
        :raises ValueError: the message is larger than MAX_MESSAGE_BYTES.
        """
        data = _encode(self._encoder, message)
        self._send_outgoing()
        if len(self._outgoing) >= self._max_outgoing:
            raise anyio.WouldBlock(f"{len(self._outgoing)} messages wait for the rank already; it doesn't read.")
        self._outgoing.append(data)
        if not self._send_outgoing():
            self._has_outgoing.set()

    async def send(self, message: SendT) -> None:
        """`send_nowait` that waits for room; raises the rest of what it raises."""
        while True:
            try:
                self.send_nowait(message)
            except anyio.WouldBlock:
                await self.flush()
            else:
                return

    async def flush(self) -> None:
        """Wait until the socket has taken all messages.

        :raises ChannelClosed: the peer is gone, or this end was closed.
        """
        async with self._flushing:
            while not self._send_outgoing():
                await self._wait(anyio.wait_writable)

    async def flush_forever(self) -> Never:
        """Flush whenever something waits: the task that `send_nowait` relies on when the socket is full.

        :raises ChannelClosed: the peer left while something waited, or this end was closed.
        """
        while True:
            await self._has_outgoing.wait()
            self._has_outgoing = anyio.Event()
            await self.flush()

    def receive_nowait(self) -> ReceiveT:
        """The next message.

        :raises anyio.WouldBlock: there is none yet.
        :raises ChannelClosed: the peer is gone and all it sent has been received, or this end was closed.
        """
        if not self._received:
            try:
                came = self._decoder.decode(_receive_bytes(self._socket))
            except BlockingIOError:
                raise anyio.WouldBlock from None
            self._received.extend(came if isinstance(came, list) else [came])
        return self._received.popleft()

    async def receive(self) -> ReceiveT:
        """Wait for the next message; raises ChannelClosed as `receive_nowait` does.

        A cancelled wait loses no message: nothing is awaited after one has left the socket. No deadline: a rank is
        silent while it has nothing to do, and its death ends the wait.
        """
        while True:
            if not self._received:
                await self._wait(anyio.wait_readable)
            try:
                return self.receive_nowait()
            except anyio.WouldBlock:
                continue

    def statistics(self) -> ChannelStatistics:
        """How much waits to be sent."""
        return ChannelStatistics(num_outgoing=len(self._outgoing), max_outgoing=self._max_outgoing)

    def close(self) -> None:
        """Close this end; tasks that wait in it get ChannelClosed. What waits to be sent is dropped."""
        if self._num_waiting:
            anyio.notify_closing(self._socket)
        self._outgoing.clear()
        self._socket.close()
        self._has_outgoing.set()

    async def _wait(self, wait: Callable[[socket.socket], Any]) -> None:
        """Await `wait_readable` or `wait_writable` of our socket."""
        if self._socket.fileno() < 0:
            raise ChannelClosed(_CLOSED)
        self._num_waiting += 1
        try:
            await wait(self._socket)
        except anyio.ClosedResourceError:
            raise ChannelClosed(_CLOSED) from None
        finally:
            self._num_waiting -= 1

    def _send_outgoing(self) -> bool:
        """Send what the socket takes now; whether that is all."""
        if self._socket.fileno() < 0:
            raise ChannelClosed(_CLOSED)
        while self._outgoing:
            try:
                _translated(self._socket.send, self._outgoing[0])
            except BlockingIOError:
                return False
            self._outgoing.popleft()
        return True


def channel_pair(
    *, max_outgoing: int = MAX_OUTGOING_MESSAGES
) -> tuple[FrontEnd[AnyCommand, AnyReply], RankEnd[AnyReply, AnyCommand]]:
    """A new channel: the front's end and the rank's."""
    front, rank = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (front, rank):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
    replies: Decoder[AnyReply | list[AnyReply]] = Decoder(AnyReply | list[AnyReply])
    commands: Decoder[AnyCommand] = Decoder(AnyCommand)
    return FrontEnd(front, replies, max_outgoing=max_outgoing), RankEnd(rank, commands)


def _rebuild_rank_end(sock: socket.socket, message_type: Any) -> RankEnd[Any, Any]:
    return RankEnd(sock, Decoder(message_type))


def _encode(encoder: Encoder, message: object) -> bytes:
    data = encoder.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(
            f"a {type(message).__name__} message takes {len(data)} bytes, the limit is {MAX_MESSAGE_BYTES}; "
            "send large data through the tensor queue"
        )
    return data


def _receive_bytes(sock: socket.socket, flags: int = 0) -> bytes:
    """The next message as bytes.

    :raises BlockingIOError: there is none yet.
    :raises ChannelClosed: the peer is gone and all it sent has been received.
    """
    try:
        data = sock.recv(MAX_MESSAGE_BYTES, flags)
    except ConnectionResetError:
        # The peer left without reading all of ours. The error is reported once, and before what the peer sent last.
        data = _translated(sock.recv, MAX_MESSAGE_BYTES, flags)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            raise
        raise _closed(error) from None
    if not data:
        raise ChannelClosed("the process at the other end of the channel closed it or died")
    return data


def _translated(operation: Callable[..., Any], *arguments: Any) -> Any:
    """Run a socket's operation; any failure but BlockingIOError becomes ChannelClosed."""
    try:
        return operation(*arguments)
    except BlockingIOError:
        raise
    except OSError as error:
        raise _closed(error) from None


def _closed(error: OSError) -> ChannelClosed:
    return ChannelClosed(f"the process at the other end of the channel is gone ({error.strerror})")
