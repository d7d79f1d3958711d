"""What the rank says while torch compiles in the middle of a forward."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from sgld.ipc.channel import RankEnd
from sgld.messages import AnyCommand, AnyReply
from sgld.worker.heartbeat import heartbeat
from sgld.worker.runtime import Runtime


@contextmanager
def alive_while_compiling(channel: RankEnd[AnyReply, AnyCommand], runtime: Runtime) -> Iterator[None]:
    """While the block runs, whatever is compiled is counted, and signs of life are sent meanwhile.

    Without a deadline: as with loading, nobody knows how long it takes.
    """
    with ExitStack() as beating:

        def started() -> None:
            runtime.num_compilations += 1
            beating.enter_context(heartbeat(channel, "compiling"))

        with watched_compilations(started, beating.close):
            yield


@contextmanager
def watched_compilations(started: Callable[[], None], ended: Callable[[], None]) -> Iterator[None]:
    """While the block runs, hear of each compilation of this process, in the thread that compiles."""
    from torch._dynamo.callback import callback_handler  # takes a second

    def on_start(_args: object) -> None:
        started()

    def on_end(_args: object) -> None:
        ended()

    callback_handler.register_start_callback(on_start)
    callback_handler.register_end_callback(on_end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(on_start)
        callback_handler.remove_end_callback(on_end)
