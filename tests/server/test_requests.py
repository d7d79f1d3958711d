"""Requests on their way, without HTTP."""

import anyio
import pytest

from sgld.errors import EngineClosed, InvalidRequest, PipelineFailed
from sgld.events import AnyEvent, Cancelled, Completed, Failed, Preview, Progress, Queued, Started
from sgld.media.inputs import InputPolicy
from sgld.sampling_params import SamplingParams
from sgld.server.requests import Finish, LiveRequest, Requests
from sgld.server.subscription import Subscription

from .fakes import TIMEOUT_S, FakeEngine

OWNER = "somebody"


async def nothing(live: LiveRequest, completed: Completed) -> None:
    pass


async def submit(requests: Requests, prompt: str, *, n: int = 1, finish: Finish = nothing) -> LiveRequest:
    params = SamplingParams(prompt=prompt, num_outputs_per_prompt=n, num_inference_steps=3)
    return await requests.submit(params, kind="img", owner=OWNER, finish=finish)


async def events_of(live: LiveRequest) -> list[AnyEvent]:
    with anyio.fail_after(TIMEOUT_S), live.subscribe() as events:
        return [event async for event in events]


def names(events: list[AnyEvent]) -> list[str]:
    return [type(event).__name__ for event in events]


async def test_events_have_the_requests_own_id() -> None:
    async with Requests(FakeEngine(), InputPolicy()) as requests:
        live = await submit(requests, "a cat", n=2)
        events = await events_of(live)

    assert {event.request_id for event in events} == {live.id}
    assert live.id.startswith("img_")
    assert sum(isinstance(event, Completed) for event in events) == 2


async def test_who_comes_late_hears_what_still_matters() -> None:
    engine = FakeEngine()
    async with Requests(engine, InputPolicy()) as requests:
        live = await submit(requests, "hang")
        await engine.hanging.wait()
        with live.subscribe() as events:
            early = [await anext(events) for _ in range(3)]
        live.cancel()
        await requests.wait_idle()
        late = await events_of(live)

    assert names(early) == ["Queued", "Started", "Progress"]
    assert names(late) == ["Queued", "Started", "Cancelled"]


async def test_a_request_that_is_over_still_tells_its_end() -> None:
    async with Requests(FakeEngine(), InputPolicy()) as requests:
        live = await submit(requests, "a cat")
        await requests.wait_idle()

        assert names(await events_of(live)) == ["Queued", "Started", "Completed"]
        assert requests.all(OWNER) == []


async def test_nobody_sees_the_requests_of_others() -> None:
    async with Requests(FakeEngine(), InputPolicy()) as requests:
        live = await submit(requests, "hang")

        assert requests.get(live.id, OWNER) is live
        assert requests.get(live.id, "other") is None
        assert (requests.all(OWNER), requests.all("other")) == ([live], [])


async def test_completed_is_told_after_the_result_is_stored() -> None:
    stored: list[int] = []

    async def store(live: LiveRequest, completed: Completed) -> None:
        await anyio.lowlevel.checkpoint()
        stored.append(completed.output_index)

    async with Requests(FakeEngine(), InputPolicy()) as requests:
        live = await submit(requests, "a cat", finish=store)
        with live.subscribe() as events:
            async for event in events:
                assert stored == ([0] if isinstance(event, Completed) else [])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PipelineFailed("no picture"), "pipeline_failed", "no picture"),
        (OSError("disk full"), "storage_failed", "disk full"),
        (OSError(28, "No space left", "/a/path"), "storage_failed", "stored: No space left"),
        (ValueError("a secret"), "internal_error", "log says more"),
    ],
)
async def test_a_result_that_can_not_be_stored_is_a_failure(error: Exception, code: str, message: str) -> None:
    async def store(live: LiveRequest, completed: Completed) -> None:
        raise error

    async with Requests(FakeEngine(), InputPolicy()) as requests:
        end = (await events_of(await submit(requests, "a cat", finish=store)))[-1]

    assert isinstance(end, Failed)
    assert (end.code, message in end.message) == (code, True)
    assert "/a/path" not in end.message


async def test_a_refusal_is_raised_where_it_was_asked() -> None:
    async with Requests(FakeEngine(), InputPolicy()) as requests:
        with pytest.raises(InvalidRequest):
            await submit(requests, "refuse invalid_request")
        assert names(await events_of(await submit(requests, "a cat")))[-1] == "Completed"


async def test_a_bug_ends_its_request_and_no_other() -> None:
    engine = FakeEngine()
    async with Requests(engine, InputPolicy()) as requests:
        other = await submit(requests, "wait")
        broken = (await events_of(await submit(requests, "break")))[-1]
        engine.go.set()

        assert isinstance(broken, Failed)
        assert broken.code == "internal_error"
        assert names(await events_of(other))[-1] == "Completed"


async def test_at_the_end_all_are_cancelled_and_nothing_is_accepted() -> None:
    engine = FakeEngine()
    async with Requests(engine, InputPolicy()) as requests:
        live = await submit(requests, "hang", n=2)

    assert [type(event) for event in (await events_of(live))[-2:]] == [Cancelled, Cancelled]
    with pytest.raises(EngineClosed):
        await submit(requests, "a cat")


async def test_a_slow_reader_gets_the_latest_progress_and_all_that_matters() -> None:
    subscription = Subscription()
    subscription.put(Queued(request_id="r", position=0, eta_s=None))
    subscription.put(Started(request_id="r"))
    for step in range(1, 1001):
        for index in range(2):
            subscription.put(Progress(request_id="r", output_index=index, step=step, num_steps=1000, eta_s=None))
    subscription.put(Cancelled(request_id="r"))
    subscription.close()

    events = [event async for event in subscription]

    assert names(events) == ["Queued", "Started", "Progress", "Progress", "Cancelled"]
    assert [event.step for event in events if isinstance(event, Progress)] == [1000, 1000]


async def test_a_reader_can_do_without_some_events() -> None:
    subscription = Subscription(ignores=(Progress, Preview))
    subscription.put(Progress(request_id="r", step=1, num_steps=2, eta_s=None))
    subscription.put(Started(request_id="r"))
    subscription.close()

    assert names([event async for event in subscription]) == ["Started"]


async def test_a_reader_that_stops_waiting_misses_nothing() -> None:
    subscription = Subscription()
    with anyio.move_on_after(0):
        await anext(subscription)
    subscription.put(Started(request_id="r"))

    assert isinstance(await anext(subscription), Started)
