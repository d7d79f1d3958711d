"""For tests, ours and those of users: does sgld serve this pipeline correctly?"""

import threading
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, assert_never

import torch
from anyio import CancelScope, to_thread

from sgld.config import EngineConfig
from sgld.engine.cost import FlatCost
from sgld.engine.replica import Rank
from sgld.engine.scheduler import Scheduler
from sgld.errors import ModelError
from sgld.ipc.channel import channel_pair
from sgld.ipc.tensor_queue import tensor_queue
from sgld.messages import Idle, Launched, Pending, Ran, Stepped
from sgld.models.backend import choose_backend
from sgld.models.load import LoadedModel, load
from sgld.models.lora import adaptable
from sgld.models.verdicts import VerdictFile
from sgld.outcome import Outcome, Value
from sgld.sampling_params import LoraChoice, StepCacheParams
from sgld.worker.adapters import Adapters, source_of
from sgld.worker.ahead import News
from sgld.worker.executor import Executor
from sgld.worker.job import Job
from sgld.worker.main import serve
from sgld.worker.runtime import Runtime
from sgld.worker.session import Session
from sgld.worker.task import Task


@dataclass(frozen=True)
class Report:
    """What came of calls that ran together.

    `outputs`: what each call returned, in order, or the exception it raised. `merged_calls`: calls of components that
    shared a forward; `largest_batch`: the most in one. `mode`: merge; interleave where no forward of the denoiser
    was shared; exclusive where the pipeline changes components while it runs, so that each call ran alone.
    `skipped_calls`: calls of the denoiser that step caches skipped, of each output; `parted_forwards`: merged forwards
    of which some calls left after the first block.
    """

    outputs: list[Any]
    merged_calls: int
    largest_batch: int
    mode: str
    skipped_calls: list[int] = field(default_factory=list)
    parted_forwards: int = 0


def run_together(
    pipeline: Any,
    calls: Sequence[Mapping[str, Any]],
    *,
    merge: bool = True,
    caches: Sequence[StepCacheParams | None] = (),
    lora: Sequence[Sequence[LoraChoice]] = (),
    runtime: Runtime | None = None,
) -> Report:
    """Run a loaded diffusers pipeline with several keyword dicts at once, as a server would, in this process.

    The real tasks, merging and executor; no rank process. Every merge that is proved right is made, whether it pays
    or not.

    :param merge: False: the calls take turns and share nothing.
    :param caches: the step cache of each call; by default none.
    :param lora: the adapters of each call, if they have any.
    :param runtime: runs the components; by default where they are, as they are.
    :raises InvalidRequest: an adapter can't be read, or doesn't fit.
    """
    watched = _Watched(Scheduler(FlatCost(), max_running_requests=len(calls) or 1, max_batch_size=max(2, len(calls))))
    session = Session(Executor(runtime=runtime, merge=merge), watched.heard, watched.ended, merges_alone=True)
    adapters = _adapters(pipeline, chain.from_iterable(lora), len(calls))
    for request_id in watched.admitted(len(calls)):
        cache = caches[int(request_id)] if caches else None
        used = adapters.use(request_id, lora[int(request_id)]) if lora else {}
        assert used is not None, "all are loaded, and there is room for all"
        session.start(Job(request_id, pipeline, dict(calls[int(request_id)]), cache=cache, adapters=used))
    while (batch := watched.scheduler.next_batch(time.monotonic())) is not None:
        session.run(batch.call_ids)
    for request_id in watched.outputs:
        adapters.release(request_id)
    adapters.close()
    names = [str(index) for index in range(len(calls))]
    return Report(
        outputs=[watched.outputs[name] for name in names],
        merged_calls=session.counters.merged_calls,
        largest_batch=session.counters.largest_batch,
        skipped_calls=[watched.num_skipped[name] for name in names],
        parted_forwards=session.executor.num_parted,
        mode=watched.mode(session.executor.verdicts.modes),
    )


class _Watched:
    """What a session says: the scheduler is told of it, and the end of each call is kept."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.outputs: dict[str, Any] = {}
        self.num_skipped: dict[str, int] = {}
        self._denoisers: set[str] = set()

    def admitted(self, num: int) -> list[str]:
        """So many requests, all of which start."""
        for index in range(num):
            self.scheduler.add(str(index), time.monotonic())
        return self.scheduler.admit(time.monotonic())

    def heard(self, news: Sequence[News]) -> None:
        for reply in news:
            match reply:
                case Pending(call=call):
                    self.scheduler.pending(call)
                    self._denoisers.update([call.component] if call.kind == "denoise" else [])
                case Launched(call_ids=call_ids):
                    self.scheduler.launched(call_ids)
                case Ran(call_ids=call_ids, elapsed_s=elapsed_s):
                    self.scheduler.ran(call_ids, elapsed_s)
                case Stepped(request_id=request_id, step=step):
                    self.scheduler.stepped(request_id, step)
                case Idle():
                    pass  # of ranks that run forwards side by side: there is one
                case unknown:
                    assert_never(unknown)

    def ended(self, task: Task, outcome: Outcome) -> None:
        self.scheduler.remove(task.request_id)
        self.num_skipped[task.request_id] = task.skips.num
        self.outputs[task.request_id] = outcome.value if isinstance(outcome, Value) else outcome.error

    def mode(self, modes: Mapping[str, str]) -> str:
        """As `Report` has it."""
        is_merged = any(modes.get(name) == "merge" for name in self._denoisers)
        return "exclusive" if "exclusive" in modes.values() else "merge" if is_merged else "interleave"


def _adapters(pipeline: Any, choices: Iterable[LoraChoice], max_combinations: int) -> Adapters:
    """All adapters that are chosen, loaded."""
    device = torch.device(getattr(pipeline, "device", "cpu"))
    adapters = Adapters(pipeline, adaptable(pipeline), device, max_bytes=2**40, max_combinations=max_combinations)
    for choice in choices:
        adapters.load_now(source_of(choice))
    return adapters


class InlineReplica:
    """Serves a loaded pipeline in a thread of this process: `Engine(config, rank_factory=InlineReplica(pipeline))`.

    The channel, the tensor queue and the rank's code are the real ones.

    :param pipeline: None: the model of the engine's config is loaded.
    :param defaults: sampling params that the model recommends, by parameter name.
    """

    def __init__(self, pipeline: Any | None, defaults: Mapping[str, Any] | None = None) -> None:
        self._pipeline = pipeline
        self._defaults = dict(defaults or {})
        self.verdict_file: VerdictFile | None = None
        """Where what is learned of a loaded pipeline is kept."""

    @asynccontextmanager
    async def __call__(self, config: EngineConfig, replica: int = 0) -> AsyncIterator[Rank]:
        """A rank, as long as the block lasts.

        :raises ModelError: several ranks are asked for.
        """
        if config.parallel.num_ranks > 1:
            raise ModelError(f"a replica inside of this process has one rank, not {config.parallel.num_ranks}")
        front, rank_end = channel_pair()
        reader, writer = tensor_queue()
        args = (rank_end, writer, config, lambda _tell: self._model(config))
        thread = threading.Thread(target=serve, args=args, name="inline-rank")
        thread.start()
        try:
            yield Rank(front, reader)
        finally:
            # The rank sees that the front is gone, cancels its tasks and leaves.
            front.close()
            with CancelScope(shield=True):
                await to_thread.run_sync(thread.join)
            writer.close()
            reader.close()

    def _model(self, config: EngineConfig) -> LoadedModel:
        if self._pipeline is None:
            return load(config)
        names = [base.__name__ for base in type(self._pipeline).__mro__]
        is_whole = choose_backend(config.backend, names, {}).is_whole
        device = torch.device(self._pipeline.device)
        return LoadedModel(self._pipeline, device, self._defaults, "inline", self.verdict_file, is_whole=is_whole)
