"""A request's status is a function of its events."""

import numpy as np
import pytest

from sgld.events import AnyEvent, Cancelled, Completed, Failed, Progress, Queued, Restarted, Started
from sgld.sampling_params import SamplingParams
from sgld.server.status import RequestStatus, after, new_status


def started(*, n: int = 1, kind: str = "img", **params: object) -> RequestStatus:
    return new_status("id", kind, SamplingParams(num_outputs_per_prompt=n, **params), 10.0)  # type: ignore[arg-type]


def told(status: RequestStatus, *events: AnyEvent) -> RequestStatus:
    for number, event in enumerate(events):
        status = after(status, event, 11.0 + number)
    return status


def completed(index: int = 0, *, num_frames: int = 1, is_video: bool = False) -> Completed:
    frames = np.zeros((num_frames, 2, 2, 3), np.uint8)
    about = {"request_id": "id", "output_index": index}
    return Completed(**about, frames=frames, seed=1, fps=None, elapsed_s=1.0, is_video=is_video)  # type: ignore[arg-type]


def test_progress_is_that_of_all_outputs() -> None:
    step = Progress(request_id="id", step=2, num_steps=4, eta_s=3.0)
    status = told(started(n=4), Started(request_id="id"), step, completed(1))

    assert status.status == "running"
    assert status.progress == pytest.approx((0.5 + 1) / 4)
    assert status.eta_s == 3.0
    assert status.started_at == 11.0


def test_what_follows_the_model_has_steps_of_its_own() -> None:
    denoised = Progress(request_id="id", step=4, num_steps=4, eta_s=3.0)
    enlarged = Progress(request_id="id", step=1, num_steps=9, eta_s=2.0, stage="postprocess")
    status = told(started(), Started(request_id="id"), denoised, enlarged)

    assert status.progress == 1.0
    assert (status.status, status.outputs[0].stage) == ("running", "postprocess")
    assert (status.outputs[0].step, status.outputs[0].num_steps) == (1, 9)
    assert told(status, Restarted(request_id="id", attempt=2)).outputs[0].stage == "denoise"


def test_the_first_output_tells_the_position() -> None:
    queued = [Queued(request_id="id", output_index=i, position=7 + i, eta_s=float(i)) for i in range(2)]
    status = told(started(n=2), *queued)

    assert (status.status, status.position, status.eta_s) == ("queued", 7, 1.0)
    assert told(status, Started(request_id="id")).position is None


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (completed(1), "completed"),
        (Failed(request_id="id", output_index=1, code="out_of_memory", message="too large"), "failed"),
        (Cancelled(request_id="id", output_index=1), "cancelled"),
    ],
)
def test_a_request_ends_as_its_worst_output(last: AnyEvent, expected: str) -> None:
    half = told(started(n=2), completed(0))
    whole = told(half, last)

    assert (half.status, half.ended_at) == ("running", None)
    assert (whole.status, whole.progress, whole.ended_at) == (expected, 1.0, 11.0)
    assert bool(whole.outputs[0].urls) == (expected == "completed")
    assert (whole.error is not None) == (expected == "failed")


def test_pictures_are_counted_through_all_outputs() -> None:
    status = told(started(n=2), completed(1), completed(0, num_frames=2))

    assert [len(output.urls) for output in status.outputs] == [2, 1]
    assert status.outputs[1].urls == ("/v1/images/id/content?variant=2",)


def test_a_video_has_one_file() -> None:
    status = told(started(kind="video"), completed(num_frames=9, is_video=True))

    assert status.kind == "video"
    assert status.outputs[0].urls == ("/v1/videos/id/content?index=0",)


def test_a_request_whose_rank_was_lost_waits_again() -> None:
    step = Progress(request_id="id", step=2, num_steps=4, eta_s=3.0)
    status = told(started(), Started(request_id="id"), step, Restarted(request_id="id", attempt=2))

    assert (status.status, status.progress, status.attempt) == ("queued", 0.0, 2)


def test_params_are_what_was_chosen_and_small() -> None:
    status = started(
        prompt="x" * 1000,
        width=64,
        num_frames=1,
        image_path=("data:;base64,AAAA",),
        diffusers_kwargs={"mask_image": {"$image": "data:;base64,AAAA"}},
    )

    assert len(status.prompt) == 600
    assert status.params == {"width": 64, "seed": 42, "n": 1, "num_input_images": 1}
