"""One output that a client waits for, and the states it goes through."""

from enum import Enum

import msgspec

from sgld.sampling_params import SamplingParams


class RequestState(Enum):
    """Where a request is on its way."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return not TRANSITIONS[self]


TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.QUEUED: frozenset({RequestState.RUNNING, RequestState.FAILED, RequestState.CANCELLED}),
    # Back to the queue: the rank was lost and the request runs again.
    RequestState.RUNNING: frozenset(
        {RequestState.QUEUED, RequestState.COMPLETED, RequestState.FAILED, RequestState.CANCELLED}
    ),
    RequestState.COMPLETED: frozenset(),
    RequestState.FAILED: frozenset(),
    RequestState.CANCELLED: frozenset(),
}


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Output `output_index` of one client call; `params` are those of this output alone."""

    id: str
    output_index: int
    params: SamplingParams
    arrived_at: float
    """Seconds on the engine's clock."""
