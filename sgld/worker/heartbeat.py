"""Signs of life of a rank while its main thread can't answer."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sgld.errors import ChannelClosed
from sgld.ipc.channel import RankEnd
from sgld.messages import Alive, AnyCommand, AnyReply

HEARTBEAT_S = 2.0


class Heart:
    """Says that the rank lives, and what it is busy with."""

    def __init__(self, channel: RankEnd[AnyReply, AnyCommand], stage: str) -> None:
        self._channel = channel
        self._stage = stage

    def __call__(self, stage: str, *, at_once: bool = False) -> None:
        """From now on it is busy with this.

        :param at_once: don't wait for the next beat, before which it may be over.
        :raises ChannelClosed: the front is gone.
        """
        self._stage = stage
        if at_once:
            self.beat()

    def beat(self) -> None:
        """Say it.

        :raises ChannelClosed: the front is gone.
        """
        self._channel.send(Alive(stage=self._stage))


@contextmanager
def heartbeat(channel: RankEnd[AnyReply, AnyCommand], stage: str) -> Iterator[Heart]:
    """Say that the rank lives while it can't answer; yields what is told of later stages."""
    heart, is_over = Heart(channel, stage), threading.Event()

    def beat() -> None:
        # That the front is gone shows where the rank speaks next.
        with suppress(ChannelClosed):
            while not is_over.wait(HEARTBEAT_S):
                heart.beat()

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield heart
    finally:
        is_over.set()
        thread.join()
