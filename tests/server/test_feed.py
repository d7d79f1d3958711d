"""The feed and those who watch it, without HTTP."""

import anyio
import numpy as np

from sgld.events import AnyEvent, Cancelled, Preview, Progress, Queued, Started
from sgld.sampling_params import SamplingParams
from sgld.server import feed as feed_module
from sgld.server import watcher as watcher_module
from sgld.server.feed import Feed
from sgld.server.requests import LiveRequest
from sgld.server.stats import ServerStats
from sgld.server.watcher import News, Watcher

from .test_requests import nothing

OWNER = "somebody"
STATS = ServerStats(
    time=1.0,
    uptime_s=1.0,
    num_queued=0,
    num_running=0,
    num_completed=0,
    num_failed=0,
    num_cancelled=0,
    num_restarts=0,
    batch_size=0.0,
    steps_per_s=0.0,
    busy=0.0,
)


def live_request(number: int = 0, *, owner: str = OWNER, n: int = 1) -> LiveRequest:
    params = SamplingParams(prompt="a cat", num_outputs_per_prompt=n)
    return LiveRequest(f"img_{number}", "img", owner, params, nothing)


def queued(live: LiveRequest, position: int = 0, index: int = 0) -> Queued:
    return Queued(request_id=live.id, output_index=index, position=position, eta_s=None)


def stepped(live: LiveRequest, step: int) -> Progress:
    return Progress(request_id=live.id, step=step, num_steps=10, eta_s=1.0)


def preview(live: LiveRequest, step: int) -> Preview:
    return Preview(request_id=live.id, step=step, image=np.zeros((4, 4, 3), np.uint8))


async def read(watcher: Watcher) -> list[News]:
    """All that is unread."""
    watcher.close()
    found: list[News] = []
    while not isinstance(chunk := await watcher.next(), str):
        found += chunk.news
    return found


def publish(feed: Feed, live: LiveRequest, *events: AnyEvent) -> None:
    for event in events:
        feed.observe(live, event)


async def test_who_is_behind_gets_the_latest_and_every_end() -> None:
    feed = Feed()
    live = live_request()
    with feed.watch(OWNER) as watcher:
        publish(feed, live, queued(live), Started(request_id=live.id))
        for step in range(1, 1000):
            publish(feed, live, stepped(live, step), preview(live, step))
        unread = feed.since(0)
        publish(feed, live, Cancelled(request_id=live.id))
        found = await read(watcher)

    assert unread is not None
    assert [(news.name, news.data.step) for news in unread if news.name == "request.preview"] == [
        ("request.preview", 999)
    ]
    assert [news.name for news in found] == ["request.queued", "request.started", "request.cancelled"]
    numbers = [news.number for news in found]
    assert numbers == sorted(numbers)


async def test_who_is_too_far_behind_needs_a_snapshot() -> None:
    feed = Feed()
    with feed.watch(OWNER) as watcher:
        for number in range(watcher_module.MAX_NEWS):
            live = live_request(number)
            publish(feed, live, queued(live), Cancelled(request_id=live.id))
        lost = await watcher.next()
        watcher.begin_anew()
        publish(feed, live_request(-1), queued(live_request(-1)))
        found = await read(watcher)

    assert lost == "lost"
    assert [news.request_id for news in found] == ["img_-1"]


async def test_all_that_is_unread_is_one_chunk_the_same_for_all_who_are_up_to_date() -> None:
    feed = Feed()
    live = live_request()
    with anyio.fail_after(60), feed.watch(OWNER) as first, feed.watch(OWNER) as second, feed.watch("another") as other:
        publish(feed, live, queued(live), Started(request_id=live.id), stepped(live, 1), preview(live, 1))
        feed.tick(STATS)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(feed.run)
            chunk, same, others = await first.next(), await second.next(), await other.next()
            tasks.cancel_scope.cancel()
        assert not isinstance(chunk, str)
        assert not isinstance(others, str)

        names = ["request.queued", "request.started", "request.progress", "request.preview", "server.stats"]
        assert [news.name for news in chunk.news] == names
        assert same is chunk
        assert [news.name for news in others.news] == ["server.stats"]
        encoded = await chunk.encoded()
        assert f"id: {feed.epoch}-1\n".encode() in encoded
        assert encoded.count(b"\n\n") == 5
        assert await chunk.encoded() is encoded


async def test_others_hear_nothing() -> None:
    feed = Feed()
    live = live_request()
    with feed.watch("another") as watcher:
        publish(feed, live, queued(live))
        feed.tick(STATS)
        found = await read(watcher)

    assert [news.name for news in found] == ["server.stats"]
    assert feed.get(live.id, "another") is None
    assert feed.all("another") == []


async def test_who_waits_moves_up_when_those_before_it_begin_or_go() -> None:
    feed = Feed()
    lives = [live_request(number) for number in range(3)]
    for position, live in enumerate(lives):
        publish(feed, live, queued(live, position))
    urgent = live_request(9, owner="another")
    publish(feed, urgent, queued(urgent, 0))
    feed.tick(STATS)
    behind = [status.position for status in feed.all(OWNER)]
    publish(feed, urgent, Started(request_id=urgent.id))
    publish(feed, lives[1], Cancelled(request_id=lives[1].id))
    with feed.watch(OWNER) as watcher:
        feed.tick(STATS)
        told = {news.request_id: news.data.position for news in await read(watcher) if news.request_id}

    assert behind == [1, 2, 3]
    assert told == {"img_0": 0, "img_2": 1}


async def test_what_is_told_again_is_bounded() -> None:
    feed = Feed()
    for number in range(watcher_module.MAX_NEWS):
        live = live_request(number)
        publish(feed, live, queued(live), Cancelled(request_id=live.id))
    recent = feed.since(feed.number - 2)

    assert feed.since(0) is None
    assert feed.since(feed.number - watcher_module.MAX_NEWS) is not None
    assert feed.since(feed.number - watcher_module.MAX_NEWS - 1) is None
    assert feed.since(feed.number + 1) is None
    assert recent is not None
    assert [news.name for news in recent] == ["request.queued", "request.cancelled"]
    assert feed.since(feed.number) == []
    assert len(feed.all(OWNER)) == feed_module.MAX_ENDED


async def test_a_reader_waits_for_news() -> None:
    feed = Feed()
    live = live_request()
    found: list[object] = []

    async def wait(watcher: Watcher) -> None:
        found.append(await watcher.next())

    with anyio.fail_after(60), feed.watch(OWNER) as watcher:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(feed.run)
            async with anyio.create_task_group() as waiting:
                waiting.start_soon(wait, watcher)
                await anyio.wait_all_tasks_blocked()
                publish(feed, live, queued(live))
            tasks.cancel_scope.cancel()

    assert len(found) == 1


async def test_a_closed_feed_has_nothing_more_to_say() -> None:
    feed = Feed()
    feed.close()
    with anyio.fail_after(60), feed.watch(OWNER) as watcher:
        assert await watcher.next() == "closed"
    assert feed.num_watchers == 0
