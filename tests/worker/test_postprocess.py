"""What happens to frames after the pipeline, in the thread of a task."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sgld.errors import InvalidRequest
from sgld.models.filters import Filter, Interpolator, Lanczos, Upscaler
from sgld.models.optical_flow import OpticalFlow
from sgld.models.super_resolution import Compact
from sgld.outcome import Outcome, Raised, Value
from sgld.sampling_params import SamplingParams
from sgld.worker.ahead import News
from sgld.worker.calls import Call
from sgld.worker.executor import Executor, single
from sgld.worker.job import Job
from sgld.worker.postprocess import FilterCall, Postprocessing, edge_of, smallest_edge
from sgld.worker.residency import Residency
from sgld.worker.runtime import Runtime
from sgld.worker.session import Session
from sgld.worker.task import Task

CPU = torch.device("cpu")
MAX_BYTES = 10**9


class Body:
    """Stands for a task: calls run at once, and what is told of them is kept."""

    request_id = "a"

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.told: list[tuple[int, int]] = []

    def hand_over(self, call: Call) -> Any:
        self.calls.append(call)
        outcome = single(call)
        if isinstance(outcome, Raised):
            raise outcome.error
        return outcome.value

    def processed(self, num_done: int, num_calls: int) -> None:
        self.told.append((num_done, num_calls))


def nearest(scale: int = 2) -> Upscaler:
    """Repeats pixels."""
    network = Compact(width=4, num_layers=1, scale=scale)
    for weight in network.body[-1].parameters():
        torch.nn.init.zeros_(weight)
    about = {"scale": scale, "radius": network.radius, "multiple": 1, "bytes_per_pixel": network.bytes_per_pixel}
    return Upscaler(network.requires_grad_(False), label=f"nearest {scale}x", **about)  # type: ignore[arg-type]


def moving(num_frames: int, *, height: int = 24, width: int = 40) -> torch.Tensor:
    """A bright square on its way to the right, two pixels a frame."""
    frames = torch.full((num_frames, height, width, 3), 40, dtype=torch.uint8)
    for index in range(num_frames):
        frames[index, 8:16, 4 + 2 * index : 12 + 2 * index] = 220
    return frames


def processed(
    body: Body, frames: torch.Tensor, *filters: Filter, is_video: bool = True, **chosen: Any
) -> list[torch.Tensor]:
    params = SamplingParams(
        enable_frame_interpolation=any(isinstance(f, Interpolator) for f in filters),
        enable_upscaling=not all(isinstance(f, Interpolator) for f in filters),
        **chosen,
    )
    postprocessing = Postprocessing(body, params, filters, CPU, Runtime())  # type: ignore[arg-type]
    return list(postprocessing.frames(frames, is_video=is_video, max_bytes=MAX_BYTES))


def test_frames_come_between_then_all_are_enlarged() -> None:
    body, frames = Body(), moving(3)
    done = processed(body, frames, Interpolator(OpticalFlow()), nearest(), frame_interpolation_exp=2, upscaling_scale=2)
    assert len(done) == (3 - 1) * 4 + 1
    assert {tuple(frame.shape) for frame in done} == {(1, 48, 80, 3)}
    for index in range(3):
        enlarged = frames[index].repeat_interleave(2, 0).repeat_interleave(2, 1)
        assert torch.equal(done[4 * index][0], enlarged)
    # Halfway between two frames it has moved by one pixel of the first, two of the enlarged ones.
    assert torch.equal(done[2][0, 20:28, 14:24, 0] > 130, torch.ones(8, 10, dtype=torch.bool))
    assert [call.component for call in body.calls[:5]] == ["upscaler", *["interpolator", "upscaler"] * 2]
    assert {call.kind for call in body.calls} == {"decode"}
    assert body.told == [(number, 6 + 9) for number in range(1, 16)]


def test_pictures_have_nothing_between_them() -> None:
    assert len(processed(Body(), moving(3), Interpolator(OpticalFlow()), is_video=False)) == 3
    assert len(processed(Body(), moving(1), Interpolator(OpticalFlow()))) == 1


@pytest.mark.parametrize(
    ("num_frames", "is_video", "notes"), [(2, True, ("2x frames by optical flow",)), (1, True, ()), (2, False, ())]
)
def test_only_what_was_done_is_noted(num_frames: int, is_video: bool, notes: tuple[str, ...]) -> None:
    params, filters = SamplingParams(enable_frame_interpolation=True), (Interpolator(OpticalFlow()),)
    postprocessing = Postprocessing(Body(), params, filters, CPU, Runtime())  # type: ignore[arg-type]
    list(postprocessing.frames(moving(num_frames), is_video=is_video, max_bytes=MAX_BYTES))
    assert postprocessing.notes == notes


@pytest.mark.parametrize("filter_", [Lanczos(), nearest(2), nearest(4)])
def test_scale_is_reached_whatever_the_network_has(filter_: Filter) -> None:
    (done,) = processed(Body(), moving(1), filter_, upscaling_scale=3)
    assert done.shape == (1, 72, 120, 3)


def test_a_frame_that_can_not_be_sent_is_refused_before_anything_is_done() -> None:
    body, params = Body(), SamplingParams(enable_upscaling=True, upscaling_scale=8)
    postprocessing = Postprocessing(body, params, (nearest(),), CPU, Runtime())  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"40x24, 8 times as large, takes 184320 bytes, 184319 is the limit"):
        next(postprocessing.frames(moving(1), is_video=True, max_bytes=184_319))
    assert body.calls == []


class Narrow(Upscaler):
    """Has room for tiles of some size only."""

    max_pixels = 10**9

    def decode(self, picture: torch.Tensor, canvas: Any, index: int) -> torch.Tensor | None:
        row, column = canvas.tiles[index]
        if (row.stop - row.start) * (column.stop - column.start) > self.max_pixels:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        return super().decode(picture, canvas, index)


def narrow(max_pixels: int) -> Narrow:
    upscaler = nearest()
    upscaler.__class__ = Narrow
    upscaler.max_pixels = max_pixels  # type: ignore[assignment]
    return upscaler  # type: ignore[return-value]


def test_where_memory_is_too_small_tiles_become_smaller_and_stay_so() -> None:
    upscaler, frames = narrow(100 * 100), moving(2, height=150, width=210)
    body = Body()
    done = processed(body, frames, upscaler, upscaling_scale=2)
    for index in range(2):
        assert torch.equal(done[index][0], frames[index].repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert upscaler.edge == smallest_edge(upscaler) < 100
    # The first try of the first frame, one at half the size, then tiles.
    assert len(body.calls) == body.told[-1][0] + 2


def test_where_there_is_no_room_for_the_smallest_tile_the_request_fails() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="no room for tiles of"):
        processed(Body(), moving(1, height=150, width=210), narrow(100), upscaling_scale=2)


def test_tiles_of_larger_networks_are_smaller() -> None:
    small, large = nearest(), nearest()
    large.num_weights, large.bytes_per_pixel = 17_000_000, 10_000
    assert edge_of(small, CPU) > edge_of(large, CPU) >= smallest_edge(large)


def test_networks_of_other_kinds_have_other_times() -> None:
    body = Body()
    for upscaler in (nearest(2), nearest(4)):
        processed(body, moving(1), upscaler)
    assert all(isinstance(call, FilterCall) for call in body.calls)
    assert len({call.cost_key for call in body.calls}) == 2


def test_others_go_on_between_two_frames() -> None:
    """One task has frames to make while the calls of another run: they take turns, and one is cancelled in between."""
    session = Session(
        Executor(), lambda news: told.extend(news), lambda task, outcome: ended.update({task.request_id: outcome})
    )
    told: list[News] = []
    ended: dict[str, Outcome] = {}
    tasks: dict[str, Task] = {}

    def job(request_id: str) -> Job:
        def prepare(task: Task, _bound: Any) -> None:
            tasks[request_id] = task

        def finish(run: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
            params = SamplingParams(enable_frame_interpolation=True)
            filters = (Interpolator(OpticalFlow()),)
            return list(
                Postprocessing(tasks[request_id], params, filters, CPU, Runtime()).frames(
                    run(), is_video=True, max_bytes=MAX_BYTES
                )
            )

        return Job(request_id, Films(), {}, prepare=prepare, finish=finish)

    session.start(job("a"))
    session.start(job("b"))
    for _ in range(2):
        for name in ("a", "b"):
            session.run([tasks[name].calls[0].id])
    assert tasks["a"].stage == "postprocess"
    session.cancel("b")
    while "a" not in ended:
        session.run([tasks["a"].calls[0].id])
    assert isinstance(ended["a"], Value)
    assert len(ended["a"].value) == 9
    assert isinstance(ended["b"], Raised)
    session.close()


class Films:
    """A pipeline that calls no model."""

    def __init__(self) -> None:
        self.components: dict[str, Any] = {}

    def __call__(self) -> torch.Tensor:
        return moving(5)


class Offloaded(Residency):
    """Has one component on the device that can leave."""

    num_held = 1

    def make_room(self, module: nn.Module) -> bool:
        self.num_held, had = 0, self.num_held
        return bool(had)


class Tight(Interpolator):
    """Has room only once others have left."""

    residency = Offloaded()

    def decode(self, first: torch.Tensor, last: torch.Tensor, time: float, scale: float) -> torch.Tensor:
        if self.residency.num_held:
            raise torch.OutOfMemoryError
        return super().decode(first, last, time, scale)


def test_offloaded_components_leave_before_a_filter_fails() -> None:
    tight, body, runtime = Tight(OpticalFlow()), Body(), Runtime(Tight.residency)
    vars(runtime)["variant"] = "graph"
    params = SamplingParams(enable_frame_interpolation=True)
    postprocessing = Postprocessing(body, params, (tight,), CPU, runtime)  # type: ignore[arg-type]
    assert len(list(postprocessing.frames(moving(2), is_video=True, max_bytes=MAX_BYTES))) == 3
    assert (len(body.calls), body.told) == (2, [(1, 1)])
    assert vars(runtime)["variant"] == "eager"
