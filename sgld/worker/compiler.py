"""The process in which denoisers are compiled, so that no request waits for it: it fills the cache of compiled code.

`python -m sgld.worker.compiler JOBS RESULT` compiles the jobs of a file, each a module and arguments without values,
and says in another what came of them. Then whoever compiles the same finds it in the cache.
"""

import faulthandler
import functools
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import nn

from sgld.models.placement import compile_module
from sgld.outcome import Raised, message_of, outcome_of
from sgld.worker.imports import importable
from sgld.worker.precision import Autocasts, autocasts
from sgld.worker.sketch import made

_NICENESS = 10
# Of the memory that is free on a GPU: the rank may need some, too.
_MAX_OF_FREE = 0.5


@dataclass(frozen=True)
class TorchState:
    """What of torch's state in this thread and process changes how something is compiled."""

    is_grad_enabled: bool
    is_inference: bool
    autocast: Autocasts
    num_threads: int

    @classmethod
    def now(cls) -> "TorchState":
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            autocasts(),
            torch.get_num_threads(),
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        torch.set_num_threads(self.num_threads)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.is_inference))
            stack.enter_context(torch.set_grad_enabled(self.is_grad_enabled))
            for device_type, dtype in self.autocast:
                stack.enter_context(torch.autocast(device_type, dtype))
            yield


@dataclass(frozen=True)
class CompileJob:
    """A module to be compiled for such arguments."""

    module: bytes
    arguments: bytes
    state: TorchState


class CompileResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of some jobs. `problem`: of the first that can't be compiled."""

    problem: str | None = None
    elapsed_s: float = 0.0
    num_compiled: int = 0
    """Graphs that weren't in the cache."""
    imported: tuple[str, ...] = ()
    """What had to be imported for that."""


def run_jobs(jobs: list[CompileJob]) -> CompileResult:
    """Compile modules in this process."""
    start, problem, before = time.perf_counter(), None, set(sys.modules)
    for job in jobs:
        ran = outcome_of(functools.partial(run_job, job))
        if isinstance(ran, Raised):
            problem = f"{type(ran.error).__name__}: {message_of(ran.error)}"
            break
    return CompileResult(
        problem=problem,
        elapsed_s=time.perf_counter() - start,
        num_compiled=graphs_of_cache()[1],
        imported=tuple(importable(name for name in list(sys.modules) if name not in before)),
    )


def graphs_of_cache() -> tuple[int, int]:
    """Graphs that this process found in the cache, and those that it didn't."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]


def run_job(job: CompileJob) -> None:
    """Compile a module in this process, for what it is given."""
    module: nn.Module = made(job.module, shares=True)
    args, kwargs = made(job.arguments)
    compile_module(module)
    with job.state.entered():
        module(*args, **kwargs)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # Here, where its errors can be told.
        torch.cuda.synchronize()


def main() -> None:
    jobs_path, result_path = map(Path, sys.argv[1:])
    faulthandler.register(signal.SIGUSR1, file=2)
    _end_with_parent()
    os.nice(_NICENESS)
    search_path, work = pickle.loads(jobs_path.read_bytes())
    sys.path[:] = search_path
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, _MAX_OF_FREE * free / total))
    set_ups, jobs = pickle.loads(work)
    for set_up in set_ups:
        set_up()
    result_path.write_bytes(msgspec.json.encode(run_jobs(jobs)))
    os._exit(0)


def _end_with_parent() -> None:
    """The parent holds the other end of stdin, and says nothing."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch, name="parent-watcher", daemon=True).start()


if __name__ == "__main__":
    main()
