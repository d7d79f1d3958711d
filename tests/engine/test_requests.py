"""Requests on their way, without an engine: what replies and losses make of them."""

from collections.abc import Iterator

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from sgld.engine.cost import FlatCost
from sgld.engine.entry import Entry
from sgld.engine.requests import Requests
from sgld.engine.scheduler import Scheduler
from sgld.engine.statistics import Tally
from sgld.events import AnyEvent, Completed, Failed, Progress
from sgld.ipc.tensor_queue import TensorReader, TensorWriter, tensor_queue
from sgld.messages import Decoded, Finished, Start, Stepped, TaskFailed
from sgld.request import RequestState
from sgld.sampling_params import SamplingParams

PIXELS = np.full((1, 2, 2, 3), 7, np.uint8)


@pytest.fixture
def queue() -> Iterator[tuple[TensorReader, TensorWriter]]:
    reader, writer = tensor_queue(num_slots=1, slot_bytes=4096)
    yield reader, writer
    reader.close()
    writer.close()


def requests_of(*prompts: str) -> tuple[Requests, list[Entry]]:
    requests = Requests([Scheduler(FlatCost())], Tally(None))
    return requests, [entry for prompt in prompts for entry in requests.add(SamplingParams(prompt=prompt), lambda: 0)]


async def told(entry: Entry) -> list[AnyEvent]:
    """The events until now."""
    entry.stream.close()
    events = []
    while (event := await entry.stream.get()) is not None:
        events.append(event)
    return events


async def test_replies_become_events_until_the_request_ends(queue: tuple[TensorReader, TensorWriter]) -> None:
    reader, writer = queue
    requests, [entry] = requests_of("a")
    assert requests.admit(0) == [Start(request_id=entry.request.id, params=entry.request.params)]
    requests.fps = 8.0
    request_id = entry.request.id
    requests.report(Stepped(request_id=request_id, step=1, num_steps=2))
    ref = writer.put(PIXELS)
    await requests.take(Decoded(request_id=request_id, index=0, is_video=False, pixels=ref), reader)
    assert requests.report(Finished(request_id=request_id)) is entry
    assert request_id not in requests
    assert requests.report(Finished(request_id=request_id)) is None
    await requests.tell_completed(entry)
    *_, progress, completed = await told(entry)
    assert isinstance(progress, Progress)
    assert isinstance(completed, Completed)
    assert np.array_equal(completed.frames, PIXELS)
    assert completed.fps == 8.0


async def test_a_long_clip_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """97 MB, put together while others have their turn, where there was no room to keep them together."""
    monkeypatch.setattr("sgld.engine.frames.MAX_IN_MEMORY", 0)
    requests, [entry] = requests_of("a")
    requests.admit(0)
    for index in (0, 27):
        entry.keep(index, np.zeros((27, 720, 832, 3), np.uint8))
    assert requests.report(Finished(request_id=entry.request.id)) is entry
    num_turns = 0

    async def take_turns() -> None:
        nonlocal num_turns
        while not done.is_set():
            await anyio.lowlevel.checkpoint()
            num_turns += 1

    done = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take_turns)
        await requests.tell_completed(entry)
        done.set()

    completed = (await told(entry))[-1]
    assert isinstance(completed, Completed)
    assert completed.frames.nbytes == 2 * 27 * 720 * 832 * 3
    assert num_turns > 10


async def test_pixels_of_a_request_that_has_ended_give_back_their_memory(
    queue: tuple[TensorReader, TensorWriter],
) -> None:
    reader, writer = queue
    requests, [entry] = requests_of("a")
    requests.cancel(entry)
    for index in range(3):  # more than there is room for
        ref = writer.put(PIXELS)
        await requests.take(Decoded(request_id=entry.request.id, index=index, is_video=False, pixels=ref), reader)


async def test_who_is_blamed_twice_fails_and_the_others_run_again(queue: tuple[TensorReader, TensorWriter]) -> None:
    requests, [bad, good] = requests_of("bad", "good")
    for _ in range(2):
        assert len(requests.admit(0)) == 2
        requests.run_again("it died", {bad.request.id}, 0)
    assert (bad.state, good.state, good.attempt) == (RequestState.FAILED, RequestState.QUEUED, 3)
    last = (await told(bad))[-1]
    assert isinstance(last, Failed)
    assert "it died, for the second time" in last.message
    assert requests.num_in(RequestState.QUEUED) == 1


async def test_failure_of_one_output_leaves_the_others(queue: tuple[TensorReader, TensorWriter]) -> None:
    requests = Requests([Scheduler(FlatCost())], Tally(None))
    first, second = requests.add(SamplingParams(prompt="a", num_outputs_per_prompt=2), lambda: 0)
    requests.admit(0)
    requests.report(TaskFailed(request_id=first.request.id, code="pipeline_failed", message="x"))
    assert (first.state, second.state) == (RequestState.FAILED, RequestState.RUNNING)
    assert first.stream is second.stream
    requests.abandon_all()
    assert second.state is RequestState.FAILED
