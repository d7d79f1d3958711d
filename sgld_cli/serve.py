"""`sgld serve`: the HTTP server, until it is told to leave."""

import argparse
import asyncio
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from sgld.config import EngineConfig, ServerConfig
from sgld.logs import set_up_logs
from sgld_cli.errors import OK
from sgld_cli.options import UsageError
from sgld_cli.settings import fill, given, merge

if TYPE_CHECKING:
    from sgld.server.serve import EngineFactory, Listener

# A client that keeps a connection can keep the event loop from ending, after all else has.
_LEAVE_S = 2.0
# On a CPU forwards keep all cores busy; the front needs little, but soon. With 500 who watch and 64 requests on 2
# cores, the p99 of an event's delay is 70 ms like this and 120 ms without.
_RANK_NICENESS = 5


def run(args: argparse.Namespace, engine_class: "EngineFactory | None" = None) -> int:
    """Run the command; :return: the exit code.

    :raises UsageError: a setting can't be used, or the address is taken.
    """
    values = {name: setting.value for name, setting in merge(given(args)).items()}
    config = fill(ServerConfig, values)
    engine_config = fill(EngineConfig, values)
    from sgld.server.serve import listen  # takes a second

    set_up = partial(set_up_logs, config.log_level, config.log_format)
    set_up()
    try:
        listener = listen(config)
    except (OSError, ValueError) as error:
        raise UsageError(f"the server can't start: {error}") from None
    anyio.run(_serve, engine_config, listener, engine_class, set_up)
    return OK


def _without_cancellations(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Report what goes wrong unseen in the event loop; connections that end with the server are no news."""
    if not isinstance(context.get("exception"), asyncio.CancelledError):
        loop.default_exception_handler(context)


async def _serve(
    engine_config: EngineConfig, listener: "Listener", engine_class: "EngineFactory | None", set_up: Callable[[], None]
) -> None:
    from sgld.engine.engine import Engine
    from sgld.engine.replica import rank_process
    from sgld.server.serve import serve

    asyncio.get_running_loop().set_exception_handler(_without_cancellations)
    print(f"sgld: serving {engine_config.model_path} on {listener.url}", file=sys.stderr, flush=True)
    rank_factory = partial(rank_process, niceness=_RANK_NICENESS, set_up=set_up)
    await serve(engine_config, listener, engine_class or partial(Engine, rank_factory=rank_factory))
    timer = threading.Timer(_LEAVE_S, os._exit, (OK,))
    timer.daemon = True
    timer.start()
