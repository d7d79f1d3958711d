"""One output that a client waits for, and the states it goes through."""

from collections.abc import Mapping
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
    max_total_pixels: int | None = None
    """Of all frames together: the file that is asked for holds no more."""
    only_videos: bool = False
    """What is asked for is a video, or a picture by name."""

    def also(self, other: "Limits") -> "Limits":
        """These, and what the other one says."""
        said = {name: value for name in self.__struct_fields__ if (value := getattr(other, name))}
        return msgspec.structs.replace(self, **said)

    def check_asked(
        self,
        params: SamplingParams,
        defaults: Mapping[str, int],
        *,
        has_pictures: bool,
        makes_videos: bool = True,
        num_steps: int | None = None,
    ) -> None:
        """See, as far as that can be told before anything is computed, that it isn't too much; raises as `check`.

        :param defaults: what the model chooses where nothing is chosen.
        :param has_pictures: most pipelines make what is as large as their picture.
        :param makes_videos: whether the model does.
        :param num_steps: where they are known.
        """
        if self.only_videos and not makes_videos and params.num_frames != 1:
            raise InvalidRequest("the model makes no videos; ask for pictures at /v1/images/generations", "model")
        # A side of which nothing is known is up to the model, and about as long.
        names = ("width", "height")
        sides = [getattr(params, name) or (None if has_pictures else defaults.get(name)) for name in names]
        known = [side for side in sides if side]
        num_frames = params.num_frames or defaults.get("num_frames", 1)
        if num_steps is None:
            num_steps = params.num_inference_steps or defaults.get("num_inference_steps", 1)
        # A file that can't be made at all is refused for what is known only.
        limits = self if len(known) == len(sides) else msgspec.structs.replace(self, max_total_pixels=None)
        limits.check(params, num_frames=num_frames, size=(known[0], known[-1]) if known else None, num_steps=num_steps)

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
        total = params.num_frames_of(num_frames)
        side = "height" if params.height and not params.width else "width"
        for field, counted, factor, value, limit in (
            (side, "pixels", params.size_factor, num_pixels, self.max_pixels),
            ("num_frames", "frames", params.frame_factor, total, self.max_frames),
            ("num_inference_steps", "steps", 1, num_steps, self.max_steps),
        ):
            if limit is not None and value > limit:
                what = f"the number of {counted}" + (", with what is made after the model's," if factor > 1 else "")
                raise InvalidRequest(f"{what} is {value}; this server allows at most {limit}", field)
        if self.max_total_pixels is not None and total > 1 and total * num_pixels > self.max_total_pixels:
            most, of = self.max_total_pixels // num_pixels, f"{num_pixels} pixels each"
            problem = f"there would be {total} frames of {of}, and such a file has at most {most} of them"
            raise InvalidRequest(f"{problem}; choose another output_format", "output_format")


NO_LIMITS = Limits()


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Output `output_index` of one client call; `params` are those of this output alone."""

    id: str
    output_index: int
    params: SamplingParams
    arrived_at: float
    """Seconds on the engine's clock."""
    limits: Limits = NO_LIMITS
