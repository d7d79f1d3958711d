"""Signs of life of a rank while its main thread can't answer."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sgld.errors import ChannelClosed
from sgld.ipc.channel import RankEnd
from sgld.messages import Alive, AnyCommand, AnyReply

HEARTBEAT_S = 2.0


@contextmanager
def heartbeat(channel: RankEnd[AnyReply, AnyCommand], stage: str) -> Iterator[None]:
    """Say that the rank lives while it can't answer."""
    is_over = threading.Event()

    def beat() -> None:
        # That the front is gone shows where the rank speaks next.
        with suppress(ChannelClosed):
            while not is_over.wait(HEARTBEAT_S):
                channel.send(Alive(stage=stage))

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
