"""What a request streams back, in this order: Queued, Started, then Progress, Preview and Frames as they come
(Restarted and again from Started if the rank was lost), and at the end one of Completed, Failed, Cancelled.

Pixels are numpy arrays, uint8, RGB or RGBA; sound is float32. Of a request with bit_depth 16 the result is uint16.
"""

from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


Stage = Literal["denoise", "postprocess"]
"""What steps are counted of: denoising, or interpolating and upscaling, frame by frame or tile by tile."""


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """What happened to output `output_index` of request `request_id`."""

    request_id: str
    output_index: int = 0


class Queued(Event, frozen=True, kw_only=True, tag="queued"):
    """The request waits; `position` requests are before it."""

    position: int
    eta_s: float | None
    """Predicted seconds until it is completed; None while nothing is known of such requests."""


class Started(Event, frozen=True, kw_only=True, tag="started"):
    """The request runs."""


class Progress(Event, frozen=True, kw_only=True, tag="progress"):
    """Step `step` of `num_steps` is done (counted from 1): of denoising, or of what frames go through after that."""

    step: int
    num_steps: int
    eta_s: float | None
    stage: Stage = "denoise"


class Restarted(Event, frozen=True, kw_only=True, tag="restarted"):
    """The rank was lost; the request runs again, for the `attempt`-th time."""

    attempt: int


class Preview(Event, frozen=True, kw_only=True, tag="preview"):
    """The picture that the model predicts at `step`: small, (H, W, 3)."""

    step: int
    image: "NDArray[np.uint8]"


class Frames(Event, frozen=True, kw_only=True, tag="frames"):
    """Frames `index` to `index + len(frames)` of the video, as soon as they are decoded, (F, H, W, 3)."""

    index: int
    frames: "NDArray[np.uint8]"


class Completed(Event, frozen=True, kw_only=True, tag="completed"):
    """The result: `frames` is (F, H, W, 3), or 4 with alpha; a picture has one, a sound none."""

    frames: "NDArray[np.uint8]"
    seed: int
    fps: float | None
    """Frames per second: the client's choice or what the model's author recommends, and those made in between."""
    elapsed_s: float
    """Seconds since the request arrived."""
    is_video: bool = False
    """Whether the frames are those of a video; else there are as many pictures, such as layers."""
    audio: "NDArray[np.float32] | None" = None
    """The sound, (channels, samples) in [-1, 1]."""
    sample_rate: int | None = None
    """Samples per second."""
    postprocessing: tuple[str, ...] = ()
    """What was done to the frames after the pipeline, and by what, for people."""


class Failed(Event, frozen=True, kw_only=True, tag="failed"):
    """The request failed; `code` is that of an error in sgld.errors."""

    code: str
    message: str


class Cancelled(Event, frozen=True, kw_only=True, tag="cancelled"):
    """The request was cancelled."""


AnyEvent = Queued | Started | Progress | Restarted | Preview | Frames | Completed | Failed | Cancelled
Terminal = Completed | Failed | Cancelled
