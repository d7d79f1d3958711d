"""What the engine has done and knows: counted as it goes, read as one frozen value."""

from collections.abc import Sequence

import msgspec

from sgld.engine.eta import EtaErrors, EtaStatistics
from sgld.engine.trace import Trace
from sgld.ipc.channel import ChannelStatistics
from sgld.ipc.tensor_queue import TensorQueueStatistics
from sgld.messages import CallInfo, CallKind, Judged, LorasHeld, Ran, Stepped, Variant
from sgld.request import Request, RequestState


class CallStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """The ticks of one method of a component: forwards, or proofs, which take several."""

    name: str
    """Component and method."""
    kind: CallKind
    num_ticks: int = 0
    num_calls: int = 0
    num_rows: int = 0
    elapsed_s: float = 0.0
    num_merged: int = 0
    """Ticks in which calls shared a forward."""
    num_proofs: int = 0
    num_reused: int = 0
    """Calls that were answered with what an earlier one had returned."""
    largest_batch: int = 0
    """The most calls that shared a forward."""
    batch_sizes: dict[int, int] = {}
    """How many forwards so many calls shared; those of proofs aren't counted."""
    num_ranks: dict[int, int] = {}
    """How many ticks so many ranks ran, where that is chosen for each."""


class MergeStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the calls of a component share forwards; `reason` says why some don't, where that was found out."""

    mode: str
    """merge, interleave or exclusive."""
    reason: str | None = None


class CostStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A forward of so many rows takes so long, as far as was learned."""

    key: str
    num_rows: int
    variant: Variant = "eager"
    elapsed_s: float


class ReplicaStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A replica at one moment; the queues to its rank are None while there is none."""

    is_ready: bool
    num_queued: int
    num_running: int
    tensor_queue: TensorQueueStatistics | None = None
    channel: ChannelStatistics | None = None
    adapters: LorasHeld = LorasHeld()
    """LoRA adapters that its rank holds."""
    is_compiling: bool = False
    """Code is on its way that later forwards will run."""
    num_code_changes: int = 0
    """How often that has changed."""


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """The engine at one moment."""

    uptime_s: float
    num_queued: int
    num_running: int
    num_completed: int
    num_failed: int
    num_cancelled: int
    num_restarts: int
    """Ranks that were lost and started again."""
    num_skipped_calls: int = 0
    """Calls of denoisers that step caches skipped."""
    calls: tuple[CallStatistics, ...]
    merging: dict[str, MergeStatistics]
    """By component."""
    costs: tuple[CostStatistics, ...]
    etas: tuple[EtaStatistics, ...] = ()
    """How far predictions were from what came."""
    replicas: tuple[ReplicaStatistics, ...]


class Tally:
    """Counts what happens, and tells the trace of it if there is one."""

    def __init__(self, trace: Trace | None) -> None:
        self.trace = trace
        self.etas = EtaErrors()
        self.num_restarts = 0
        self.num_skipped_calls = 0
        self._skipped: dict[str, int] = {}
        self.num_ended = dict.fromkeys((state for state in RequestState if state.is_terminal), 0)
        self.merging: dict[str, MergeStatistics] = {}
        self._calls: dict[str, CallStatistics] = {}
        self._pending: dict[tuple[int, int], CallInfo] = {}
        """By replica and id."""
        self._launched: dict[tuple[int, int], CallInfo] = {}
        """Those that a device has."""

    @property
    def calls(self) -> tuple[CallStatistics, ...]:
        """What ran so far, by component and method."""
        return tuple(self._calls.values())

    def started(self, request: Request, now: float) -> None:
        """A request begins to run."""
        if self.trace is not None:
            self.trace.span(request.id, "queued", request.arrived_at, now)

    def pending(self, call: CallInfo, replica: int = 0) -> None:
        """A call waits."""
        self._pending[replica, call.id] = call

    def launched(self, call_ids: Sequence[int], replica: int = 0) -> None:
        """The device of a replica goes on with these calls."""
        for key in [(replica, call_id) for call_id in call_ids]:
            if key in self._pending:
                self._launched[key] = self._pending.pop(key)

    def lost(self, replica: int = 0) -> set[str]:
        """A rank is lost; the requests of which its device had calls."""
        return {self._launched.pop(key).request_id for key in list(self._launched) if key[0] == replica}

    def ran(self, reply: Ran, replica: int = 0) -> None:
        """A tick of a replica is over."""
        self.launched(reply.call_ids, replica)
        keys = [(replica, call_id) for call_id in reply.call_ids]
        calls = [call for key in keys if (call := self._launched.pop(key, None)) is not None]
        if not calls:
            return  # of requests that were cancelled meanwhile
        name = reply.cost_key.partition("(")[0]
        before = self._calls.get(name) or CallStatistics(name=name, kind=calls[0].kind)
        is_merged = reply.mode == "merged"
        self._calls[name] = CallStatistics(
            name=name,
            kind=before.kind,
            num_ticks=before.num_ticks + 1,
            num_calls=before.num_calls + len(reply.call_ids),
            num_rows=before.num_rows + reply.rows,
            elapsed_s=before.elapsed_s + reply.elapsed_s,
            num_merged=before.num_merged + is_merged,
            num_proofs=before.num_proofs + (reply.mode == "proof"),
            num_reused=before.num_reused + reply.num_reused,
            largest_batch=max(before.largest_batch, len(reply.call_ids) if is_merged else 1),
            batch_sizes=_counted(before.batch_sizes, reply),
            num_ranks=_with_ranks(before.num_ranks, reply),
        )
        if self.trace is not None:
            self.trace.ran(reply, calls, replica)

    def stepped(self, reply: Stepped) -> None:
        """A request is a step further."""
        if reply.num_skipped_calls:
            before = self._skipped.get(reply.request_id, 0)
            self.num_skipped_calls += reply.num_skipped_calls - before
            self._skipped[reply.request_id] = reply.num_skipped_calls

    def judged(self, reply: Judged) -> None:
        """The rank found out how components merge."""
        self.merging = {
            name: MergeStatistics(mode=mode, reason=reply.reasons.get(name)) for name, mode in reply.modes.items()
        }

    def ended(self, request: Request, state: RequestState, now: float) -> None:
        """A request is over; calls of it that wait never run."""
        self.num_ended[state] += 1
        self.etas.ended(request.id, now, is_completed=state is RequestState.COMPLETED)
        self._forget(request.id)
        if self.trace is not None:
            self.trace.ended(request.id, state.value, now)

    def restarted(self, request: Request, now: float) -> None:
        """The rank was lost, and the request goes back to the queue."""
        self._forget(request.id)
        if self.trace is not None:
            self.trace.ended(request.id, "rank lost", now)

    def _forget(self, request_id: str) -> None:
        self._skipped.pop(request_id, None)
        for calls in (self._pending, self._launched):
            for key in [key for key, call in calls.items() if call.request_id == request_id]:
                del calls[key]


def _counted(sizes: dict[int, int], reply: Ran) -> dict[int, int]:
    if reply.mode == "proof":
        return sizes
    size, num = (len(reply.call_ids), 1) if reply.mode == "merged" else (1, len(reply.call_ids))
    return sizes | {size: sizes.get(size, 0) + num}


def _with_ranks(counts: dict[int, int], reply: Ran) -> dict[int, int]:
    if reply.ranks is None:
        return counts
    return counts | {reply.ranks.num: counts.get(reply.ranks.num, 0) + 1}
