from itertools import pairwise

import anyio
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sgld.engine.entry import Entry, EventStream
from sgld.events import AnyEvent, Completed, Preview, Progress, Queued, Restarted, Started
from sgld.request import Request, RequestState
from sgld.sampling_params import SamplingParams

TIMEOUT_S = 60
PIXEL = np.zeros((1, 1, 3), np.uint8)


def progress(step: int, output: int = 0) -> Progress:
    return Progress(request_id="r", output_index=output, step=step, num_steps=9, eta_s=None)


def preview(step: int, output: int = 0) -> Preview:
    return Preview(request_id="r", output_index=output, step=step, image=PIXEL)


def completed(output: int = 0) -> Completed:
    return Completed(request_id="r", output_index=output, frames=PIXEL[None], seed=1, fps=None, elapsed_s=1.0)


def entry() -> Entry:
    return Entry(Request(id="r1-0", output_index=0, params=SamplingParams(), arrived_at=0.0), "r1")


def frames(first: int, last: int) -> NDArray[np.uint8]:
    """Frames that show their own index, (F, 1, 1, 3)."""
    return np.broadcast_to(np.arange(first, last, dtype=np.uint8)[:, None, None, None], (last - first, 1, 1, 3))


def shown(pixels: NDArray[np.uint8]) -> list[int]:
    return [int(frame[0, 0, 0]) for frame in pixels]


def outline(event: AnyEvent | None) -> tuple[str, int, int | None]:
    """What tells events apart here; those with pixels can't be compared."""
    return (type(event).__name__, event.output_index if event else 0, getattr(event, "step", None))


async def taken(stream: EventStream) -> list[tuple[str, int, int | None]]:
    """The outlines of the events that wait."""
    stream.close()
    events = []
    with anyio.fail_after(TIMEOUT_S):
        while (event := await stream.get()) is not None:
            events.append(outline(event))
    return events


async def test_events_come_in_the_order_in_which_they_were_put() -> None:
    stream = EventStream()
    events: list[AnyEvent] = [
        Queued(request_id="r", position=0, eta_s=None),
        Started(request_id="r"),
        progress(1),
        preview(1),
        completed(),
    ]
    for event in events:
        stream.put(event)
    assert await taken(stream) == [outline(event) for event in events]


async def test_only_the_latest_progress_and_preview_of_each_output_wait() -> None:
    stream = EventStream()
    for step in (1, 2, 3):
        stream.put(progress(step))
        stream.put(preview(step))
        stream.put(progress(step, output=1))
    assert await taken(stream) == [outline(event) for event in (progress(3), preview(3), progress(3, output=1))]


async def test_progress_after_a_restart_comes_after_the_restart() -> None:
    stream = EventStream()
    stream.put(progress(5))
    stream.put(Restarted(request_id="r", attempt=2))
    stream.put(Started(request_id="r"))
    stream.put(progress(1))
    assert [kind for kind, *_ in await taken(stream)] == ["Restarted", "Started", "Progress"]


@given(
    st.lists(
        st.sampled_from([progress(1), progress(2), preview(1), preview(2), progress(1, 1), preview(1, 1)]), max_size=50
    )
)
async def test_waiting_events_are_few_and_the_end_is_never_lost(news: list[AnyEvent]) -> None:
    stream = EventStream()
    for event in news[: len(news) // 2]:
        stream.put(event)
    stream.put(completed(0))
    for event in news[len(news) // 2 :]:
        stream.put(event)
    stream.put(completed(1))
    waiting = await taken(stream)
    assert len(waiting) <= 4 + 2
    assert [output for kind, output, _ in waiting if kind == "Completed"] == [0, 1]
    assert waiting[-1] == outline(completed(1))
    latest = {outline(event)[:2]: outline(event) for event in news}
    assert set(latest.values()) <= set(waiting)


async def test_consumer_is_woken_by_an_event_and_by_the_end() -> None:
    stream = EventStream()
    seen: list[AnyEvent | None] = []
    has_seen_first = anyio.Event()

    async def consume() -> None:
        seen.append(await stream.get())
        has_seen_first.set()
        seen.append(await stream.get())

    with anyio.fail_after(TIMEOUT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume)
            await anyio.wait_all_tasks_blocked()
            stream.put(progress(1))
            await has_seen_first.wait()
            await anyio.wait_all_tasks_blocked()
            stream.close()
    assert seen == [progress(1), None]


async def test_cancelled_wait_loses_no_event() -> None:
    stream = EventStream()
    with anyio.move_on_after(0):
        await stream.get()
    stream.put(progress(1))
    assert await taken(stream) == [outline(progress(1))]


def test_events_of_an_entry_name_the_clients_request_and_the_output() -> None:
    request = Request(id="r7-3", output_index=3, params=SamplingParams(), arrived_at=0.0)
    assert Entry(request, "r7").event(Started) == Started(request_id="r7", output_index=3)


def test_pieces_are_delivered_once_and_kept_in_order() -> None:
    kept = entry()
    for first, last in pairwise((0, 1, 5, 9)):
        new = kept.keep(first, frames(first, last))
        assert new is not None
        assert (new[0], shown(new[1])) == (first, list(range(first, last)))
    assert shown(kept.frames.joined()) == list(range(9))


def test_frames_that_replace_others_are_kept_and_not_delivered_again() -> None:
    kept = entry()
    kept.keep(0, frames(0, 3))
    assert kept.keep(0, frames(10, 13)) is None
    new = kept.keep(3, frames(13, 15))
    assert new is not None
    assert (new[0], shown(new[1])) == (3, [13, 14])
    assert shown(kept.frames.joined()) == [10, 11, 12, 13, 14]


def test_frames_that_replace_a_part_of_a_piece_leave_the_rest_of_it() -> None:
    kept = entry()
    kept.keep(0, frames(0, 4))
    new = kept.keep(2, frames(12, 16))
    assert new is not None
    assert (new[0], shown(new[1])) == (4, [14, 15])
    assert shown(kept.frames.joined()) == [0, 1, 12, 13, 14, 15]


def test_after_a_restart_frames_are_kept_anew_and_delivered_from_where_it_broke() -> None:
    kept = entry()
    kept.change(RequestState.RUNNING)
    kept.keep(0, frames(0, 3))
    kept.change(RequestState.QUEUED)
    kept.change(RequestState.RUNNING)
    assert kept.keep(0, frames(0, 2)) is None
    new = kept.keep(2, frames(2, 6))
    assert new is not None
    assert (new[0], shown(new[1])) == (3, [3, 4, 5])
    assert shown(kept.frames.joined()) == [0, 1, 2, 3, 4, 5]


@given(st.lists(st.lists(st.integers(1, 4), max_size=5), min_size=1, max_size=4))
def test_delivered_frames_are_without_gap_or_repetition(attempts: list[list[int]]) -> None:
    """Each attempt sends pieces of the same video from its beginning, and breaks off."""
    kept = entry()
    delivered: list[int] = []
    for sizes in attempts:
        if kept.state is RequestState.RUNNING:
            kept.change(RequestState.QUEUED)
        kept.change(RequestState.RUNNING)
        index = 0
        for size in sizes:
            new = kept.keep(index, frames(index, index + size))
            index += size
            if new is not None:
                assert new[0] == len(delivered)
                delivered += shown(new[1])
        assert len(kept.frames) == index
    assert delivered == list(range(max(map(sum, attempts))))


@pytest.mark.parametrize("state", [RequestState.COMPLETED, RequestState.FAILED, RequestState.CANCELLED])
def test_ended_request_stays_ended(state: RequestState) -> None:
    ended = entry()
    ended.change(RequestState.RUNNING)
    ended.change(state)
    assert ended.state.is_terminal
    with pytest.raises(AssertionError, match=r"r1-0: .* to .*RUNNING"):
        ended.change(RequestState.RUNNING)
