"""One output that a client waits for, and the states it goes through."""

from enum import Enum

import msgspec

from sgld.errors import InvalidRequest
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


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much may come out of one request, and go into it; None: as much as it likes."""

    max_pixels: int | None = None
    max_frames: int | None = None
    max_steps: int | None = None

    def check(
        self,
        params: SamplingParams,
        *,
        num_frames: int = 1,
        size: tuple[int, int] | None = None,
        num_steps: int = 1,
    ) -> None:
        """See that a pipeline's steps, and what is made of its frames, aren't too much.

        :param size: width and height of a frame; None: not known.
        :raises InvalidRequest: names the field, its value and the limit.
        """
        num_pixels = 0 if size is None else size[0] * size[1] * params.size_factor**2
        side = "height" if params.height and not params.width else "width"
        for field, counted, factor, value, limit in (
            (side, "pixels", params.size_factor, num_pixels, self.max_pixels),
            ("num_frames", "frames", params.frame_factor, params.num_frames_of(num_frames), self.max_frames),
            ("num_inference_steps", "steps", 1, num_steps, self.max_steps),
        ):
            if limit is not None and value > limit:
                what = f"the number of {counted}" + (", with what is made after the model's," if factor > 1 else "")
                raise InvalidRequest(f"{what} is {value}; this server allows at most {limit}", field)


NO_LIMITS = Limits()


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Output `output_index` of one client call; `params` are those of this output alone."""

    id: str
    output_index: int
    params: SamplingParams
    arrived_at: float
    """Seconds on the engine's clock."""
    limits: Limits = NO_LIMITS
