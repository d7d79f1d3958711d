"""Rank 0 of a replica: commands in, calls and results out."""

import functools
import time
from collections.abc import Mapping
from contextlib import nullcontext
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, assert_never

from sgld.config import EngineConfig
from sgld.errors import InvalidRequest, OutOfMemory, PipelineFailed, SgldError
from sgld.ipc.channel import RankEnd
from sgld.ipc.seats import ALONE, Seat
from sgld.ipc.tensor_queue import TensorWriter
from sgld.messages import (
    Alive,
    AnyCommand,
    AnyReply,
    Cancel,
    Exit,
    Finished,
    Idle,
    Judged,
    LoadLora,
    LoraDropped,
    LoraFailed,
    LoraLoaded,
    LorasHeld,
    Noted,
    Run,
    Start,
    TaskCancelled,
    TaskFailed,
    UnloadLora,
)
from sgld.models.filters import Filter
from sgld.outcome import Outcome, Raised, outcome_of
from sgld.parallel import Ranks
from sgld.worker import ahead
from sgld.worker.adapters import Loaded, Source, adapters_of
from sgld.worker.admission import Admission
from sgld.worker.assembly import runtime_of, swap_of
from sgld.worker.clock import device_clock
from sgld.worker.compilation import alive_while_compiling
from sgld.worker.delivery import Delivery
from sgld.worker.executor import Executor
from sgld.worker.filters import Filters
from sgld.worker.memory import Memory
from sgld.worker.out_of_memory import is_out_of_memory
from sgld.worker.preparation import Preparation
from sgld.worker.preview import Previewer
from sgld.worker.results import Results
from sgld.worker.session import Session
from sgld.worker.slots import Applied
from sgld.worker.task import Task, is_cancelled

if TYPE_CHECKING:
    from sgld.models.load import LoadedModel
    from sgld.worker.lanes import Lanes
    from sgld.worker.leader import Leader

# Some errors quote the whole of an argument; a message between processes has a limit.
MAX_ERROR_CHARS = 4000
MAX_REASON_CHARS = 500
# How often a rank that waits for its own thread looks, and how often it says that it lives.
LOOK_S = 0.02
ALIVE_S = 2.0
# How often one whose GPU works beside others looks whether it is done.
LANE_LOOK_S = 0.0005


class Rank:
    """Serves one loaded model. All of it runs in the thread that owns the device, but for tasks and results."""

    def __init__(
        self,
        model: "LoadedModel",
        channel: RankEnd[AnyReply, AnyCommand],
        tensors: TensorWriter,
        config: EngineConfig,
        seat: Seat = ALONE,
    ) -> None:
        self._model = model
        self._channel = channel
        self._results = Results(channel, tensors)
        self._memory = Memory(model.verdict_file)
        is_gpu = model.device.type == "cuda"
        runtime = self._runtime = runtime_of(model, model.pipeline.components, config, self._note)
        if model.is_compiled_aside:
            runtime.swap = swap_of(model, runtime, channel, self._note)
        leader = runtime.ranks = self._leader(seat, config) if seat.num_ranks > 1 else None
        self._executor = Executor(
            self._memory.recall(),
            runtime,
            merge=config.merge,
            clock=device_clock(model.device.type),
            pulse=self._pulse,
            max_encodings_bytes=config.conditioning.max_bytes,
        )
        # On a CPU two rows take twice the time of one.
        merges_alone = is_gpu or runtime.parts_rows
        self._lanes = self._lanes_of(leader)
        self._session = Session(self._executor, channel.send_all, self._ended, merges_alone, self._lanes)
        self._preparation = Preparation(model, self._results, Previewer(runtime.borrowed), runtime)
        self._told = Judged(modes={}, reasons={})
        self._told_loras = LorasHeld()
        self._told_alive_at = 0.0
        self._deliveries: dict[str, Delivery] = {}
        self._is_order_told = True
        """The front knows that its last order is done."""
        self._adapters = adapters_of(model.pipeline, model.device, config.adapters)
        if runtime.ranks is not None:
            runtime.ranks.follow_adapters(self._adapters.slots)
        self._filters = Filters(model.device)
        self._admission = Admission(self._adapters, self._filters, self._start, self._not_started)
        if is_gpu:
            tensors.pin()

    def run(self) -> None:
        """Do what the front commands until it says `Exit`.

        :raises ChannelClosed: the front is gone.
        :raises Exception: results can't be sent any more.
        """
        for loaded in self._adapters.all():
            self._tell_loaded(loaded)
        is_inline = self._model.compiled and self._runtime.swap is None
        with alive_while_compiling(self._channel, self._runtime) if is_inline else nullcontext():
            self._serve()

    def _serve(self) -> None:
        try:
            while True:
                self._look_at_adapters()
                if not self._deliveries:
                    # Nobody is held up by what is read now.
                    self._runtime.look()
                self._session.look()
                if not self._is_order_told and not self._session.hold(self._channel.is_readable):
                    self._tell_order()
                if self._session.ended_lanes():
                    self._tell_verdicts()
                    self._memory.keep(self._executor.verdicts)
                match self._receive():
                    case Start() as asked:
                        self._admission.add(asked)
                    case Run(call_ids=call_ids, num_ticks=num_ticks, ranks=ranks):
                        self._run(call_ids, num_ticks, ranks)
                    case Cancel(request_id=request_id):
                        if self._admission.cancel(request_id):
                            self._results.message(TaskCancelled(request_id=request_id))
                        self._session.cancel(request_id)
                    case LoadLora(path=path, alpha=alpha):
                        source = Source(path, alpha)
                        if (adapter := self._adapters.load(source)) is not None:
                            self._tell_loaded(Loaded(source, adapter))
                    case UnloadLora(path=path, alpha=alpha):
                        self._adapters.unload(Source(path, alpha))
                    case Exit():
                        return
                    case None:
                        continue
                    case unknown:
                        assert_never(unknown)
        finally:
            self._session.close()
            self._adapters.close()
            self._filters.close()
            self._runtime.close()
            self._results.close()

    def _run(self, call_ids: tuple[int, ...], num_ticks: int, ranks: Ranks | None) -> None:
        """Run a forward on all ranks, and those that follow; on some of them only one, while others go on."""
        if self._lanes is None or ranks is None:
            self._session.run(call_ids, num_ticks, self._is_interrupted)
            self._is_order_told = False
        elif ranks.num == self._lanes.num_ranks:
            self._session.run(call_ids, num_ticks, self._is_interrupted, ranks)
            self._is_order_told = False
        elif not self._session.begin(call_ids, ranks):
            self._channel.send(Idle(first_rank=ranks.first))

    def _receive(self) -> AnyCommand | None:
        """The next command; None: something else may have come up."""
        patience_s = self._patience_s()
        if self._lanes is None or not self._lanes.waits_on:
            return self._channel.receive(patience_s)
        wait([self._channel.fileno(), *self._lanes.waits_on], patience_s)
        return self._channel.receive(0)

    def _patience_s(self) -> float | None:
        """How long to wait for a command.

        No deadline: a rank without requests has nothing to do, unless its device or its own thread has.
        """
        if self._lanes is not None and self._lanes.is_on_device:
            return LANE_LOOK_S
        if self._session.is_ahead:
            return ahead.LOOK_S
        is_taking_over = self._runtime.is_code_pending and not self._deliveries
        return LOOK_S if self._is_loading or is_taking_over else None

    def _tell_order(self) -> None:
        """Tell that an order is done.

        As late as the device allows, and after all that came meanwhile, which so has its say in what runs next.
        """
        self._is_order_told = True
        self._tell_verdicts()
        self._channel.send(Idle())
        self._memory.keep(self._executor.verdicts)

    def _is_interrupted(self, wait_s: float) -> bool:
        """Whether something comes up that ends a standing order, within so many seconds."""
        has_news = self._adapters.has_news or self._filters.has_news or self._judged() != self._told
        return has_news or self._channel.is_readable(wait_s)

    @property
    def _is_loading(self) -> bool:
        """Whether requests may wait for a thread of the rank's own."""
        return self._adapters.is_loading or self._filters.is_loading

    def _look_at_adapters(self) -> None:
        """Start requests whose adapters are there, and tell what was read."""
        for loaded in self._admission.look(can_install=self._can_install):
            self._tell_loaded(loaded)
        for path, alpha in self._adapters.take_dropped():
            self._channel.send(LoraDropped(path=path, alpha=alpha))
        held = self._adapters.held()
        if held != self._told_loras:
            self._told_loras = held
            self._channel.send(held)
        if self._is_loading and time.monotonic() > self._told_alive_at + ALIVE_S:
            self._told_alive_at = time.monotonic()
            self._channel.send(Alive(stage="loading what requests wait for"))

    def _can_install(self) -> bool:
        """Whether adapters may come into slots now."""
        return not self._session.is_exclusive

    def _tell_loaded(self, loaded: Loaded) -> None:
        (path, alpha), result = loaded.source, loaded.result
        if isinstance(result, InvalidRequest):
            self._channel.send(LoraFailed(path=path, alpha=alpha, message=str(result)[:MAX_ERROR_CHARS]))
            return
        self._channel.send(
            LoraLoaded(
                path=path,
                alpha=alpha,
                size_bytes=result.size_bytes,
                num_layers=self._adapters.num_layers(result),
                num_unmatched=result.num_unmatched,
            )
        )

    def _leader(self, seat: Seat, config: EngineConfig) -> "Leader":
        """Lead the others, as soon as they have all loaded the model."""
        from sgld.worker.distributed import lead  # torch.distributed takes a while to import

        return lead(seat, self._model, config, self._note)

    def _lanes_of(self, leader: "Leader | None") -> "Lanes | None":
        """What ranks run that choose for each forward; None: they share all of them, or there is one."""
        if leader is None:
            return None
        from sgld.worker.lanes import lanes_of

        return lanes_of(self._executor, leader, self._model.device)

    def _note(self, component: str, note: str) -> None:
        self._channel.send(Noted(component=component, note=note))

    def _tell_verdicts(self) -> None:
        """Tell how components merge, if that is news."""
        judged = self._judged()
        if judged != self._told:
            self._told = judged
            self._channel.send(judged)

    def _judged(self) -> Judged:
        verdicts = self._executor.verdicts
        reasons = {name: reason[:MAX_REASON_CHARS] for name, reason in verdicts.reasons.items()}
        return Judged(modes=dict(verdicts.modes), reasons=reasons)

    def _pulse(self) -> None:
        """Say that the rank lives while one command takes several forwards."""
        self._channel.send(Alive(stage="proving"))

    def _not_started(self, request_id: str, error: BaseException) -> None:
        self._failed(request_id, translated(error, has_made_calls=False))

    def _start(self, asked: Start, applied: Mapping[str, Applied], filters: tuple[Filter, ...]) -> None:
        # What it can't begin with fails it alone.
        prepared = outcome_of(functools.partial(self._preparation.job_of, asked, applied, filters))
        if isinstance(prepared, Raised):
            self._adapters.release(asked.request_id)
            self._not_started(asked.request_id, prepared.error)
            return
        job, self._deliveries[asked.request_id] = prepared.value
        self._session.start(job)

    def _ended(self, task: Task, outcome: Outcome) -> None:
        request_id = task.request_id
        self._adapters.release(request_id)
        delivery = self._deliveries.pop(request_id)
        if is_cancelled(outcome):
            self._results.message(TaskCancelled(request_id=request_id))
        elif isinstance(outcome, Raised):
            self._failed(request_id, translated(outcome.error, has_made_calls=task.num_calls > 0))
        else:
            self._results.message(Finished(request_id=request_id, postprocessing=delivery.notes))

    def _failed(self, request_id: str, error: SgldError) -> None:
        message = str(error)[:MAX_ERROR_CHARS]
        self._results.message(TaskFailed(request_id=request_id, code=error.code, message=message))


def translated(error: BaseException, *, has_made_calls: bool) -> SgldError:
    """What the client is told of an exception of its pipeline.

    Pipelines check their arguments before they call anything, and complain with ValueError or TypeError.
    """
    if isinstance(error, SgldError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory("the device has too little memory for this request; ask for a smaller size or fewer frames")
    if not has_made_calls and isinstance(error, ValueError | TypeError):
        return InvalidRequest(str(error))
    return PipelineFailed(f"{type(error).__name__}: {error}")
