"""What the rank says while torch compiles in the middle of a forward, and how it has that done elsewhere."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import nn

from sgld.ipc.channel import RankEnd
from sgld.messages import AnyCommand, AnyReply, Compiling
from sgld.models.performance import Compilation
from sgld.worker.heartbeat import heartbeat
from sgld.worker.runtime import Runtime
from sgld.worker.swap import Swap


def swap_of(
    names: Mapping[nn.Module, str],
    compilation: Compilation,
    runtime: Runtime,
    channel: RankEnd[AnyReply, AnyCommand],
    note: Callable[[str, str], None],
) -> Swap:
    """Components of a rank are compiled by a process of its own.

    :param names: of components, by module.
    """
    compiling = functools.partial(alive_while_compiling, channel, runtime)

    def inline(module: nn.Module) -> None:
        runtime.compile_inline(module, names[module], compiling)

    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    swap = Swap(
        names,
        after_s=compilation.after_s,
        inline=inline if compilation.is_asked_for else None,
        note=note,
        changed=runtime.forget,
        compiling=compiling,
        pending=lambda is_pending: channel.send(Compiling(is_pending=is_pending)),
        cache=Path(cache) if cache else None,
    )
    if not compilation.after_s:
        swap.expect()
    return swap


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
