"""Ranks as real processes that begin with torch and diffusers imported, which is most of what a start takes.

Each is forked from a process that has imported them and does nothing else, where sgld spawns a new one. What they are
given, do and how they end is the same. Spawned ones are in test_faults.py, test_soak.py and the tests of `sgld serve`.
"""

import functools
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

from sgld.engine.replica import rank_process

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["sgld.models.load", "sgld.worker.rank", "sgld.worker.distributed"])


def _preloaded(*, target: Callable[..., None], args: tuple[Any, ...], name: str) -> Any:
    return _FORKS.Process(target=_run, args=(dict(os.environ), target, args), name=name)


def _run(environment: dict[str, str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
    # The process that it is forked from has the environment of the first test.
    os.environ.clear()
    os.environ.update(environment)
    target(*args)


preloaded_rank = functools.partial(rank_process, process=_preloaded)
