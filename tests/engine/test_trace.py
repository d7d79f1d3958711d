import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pipelines import build

from engine.calls import call
from engine.streams import completed, ends_of, leave_at, params_of
from sgld.config import EngineConfig
from sgld.engine.engine import Engine
from sgld.engine.trace import Trace, track_of
from sgld.events import Completed
from sgld.fields import FieldError
from sgld.messages import CallInfo, Ran
from sgld.parallel import Ranks
from sgld.testing import InlineReplica

Event = dict[str, Any]


def read(path: Path) -> list[Event]:
    events: list[Event] = json.loads(path.read_text())
    return events


def ticks_of(events: list[Event]) -> list[Event]:
    return [event for event in events if event["ph"] == "X" and event["pid"] == 1]


def parts_of(events: list[Event]) -> dict[str, list[Event]]:
    """What each request went through, by its id, in the order of time."""
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == 2}
    parts: dict[str, list[Event]] = {name: [] for name in names.values()}
    for event in sorted((e for e in events if e["ph"] == "X" and e["pid"] == 2), key=lambda e: e["ts"]):
        parts[names[event["tid"]]].append(event)
    return parts


async def test_trace_of_two_requests_adds_up(tmp_path: Path) -> None:
    pipeline, kwargs = build("pixart")
    path = tmp_path / "trace.json"
    requests = [params_of(kwargs, num_inference_steps=n, seed=n, prompt="a cat") for n in (8, 5)]
    config = EngineConfig(device="cpu", trace=str(path))
    async with Engine(config, rank_factory=InlineReplica(pipeline)) as engine:
        ends = await ends_of(engine, *requests)
        for end in ends:
            assert isinstance(end, Completed)
            engine.record(end, "write", 1.0, 2.0)
        counted = engine.statistics().calls
        assert not path.exists()
    events = read(path)

    ticks, parts = ticks_of(events), parts_of(events)
    assert set(parts) == {f"{end.request_id}-0" for end in ends}
    # Each tick's requests are those on whose tracks it is, and its rows are theirs.
    of_tick: dict[int, list[tuple[str, Event]]] = {}
    for request_id, passed in parts.items():
        for part in passed:
            if "tick" in part["args"]:
                of_tick.setdefault(part["args"]["tick"], []).append((request_id, part))
    assert [tick["args"]["tick"] for tick in ticks] == list(range(1, len(ticks) + 1)) == sorted(of_tick)
    for tick in ticks:
        mine = of_tick[tick["args"]["tick"]]
        assert sorted(tick["args"]["requests"]) == sorted(request_id for request_id, _ in mine)
        assert sorted(tick["args"]["calls"]) == sorted(part["args"]["call"] for _, part in mine)
        assert tick["args"]["rows"] == sum(part["args"]["rows"] for _, part in mine)
        assert {(part["ts"], part["dur"]) for _, part in mine} == {(tick["ts"], tick["dur"])}
        assert len(mine) == 1 or tick["args"]["merge_key"]
    assert {tick["args"]["mode"] for tick in ticks} == {"single", "merged", "proof"}
    assert {tick["name"] for tick in ticks} == {"text_encoder.forward", "transformer.forward", "vae.decode"}

    # Ticks don't overlap: there is one device.
    for before, after in pairwise(ticks):
        assert before["ts"] + before["dur"] <= after["ts"] + 1e-3
    # Each request waits, encodes, does its steps in order, decodes, is sent and written.
    for passed, params in zip(parts.values(), requests, strict=True):
        names = list(dict.fromkeys(part["name"] for part in passed))
        steps = [f"step {i}/{params.num_inference_steps}" for i in range(1, (params.num_inference_steps or 0) + 1)]
        assert names == ["write", "queued", "encode", *steps, "decode", "transfer"]

    # The statistics count the same.
    assert sum(c.num_ticks for c in counted) == len(ticks)
    assert sum(c.num_rows for c in counted) == sum(tick["args"]["rows"] for tick in ticks)
    modes = Counter(tick["args"]["mode"] for tick in ticks)
    assert (sum(c.num_merged for c in counted), sum(c.num_proofs for c in counted)) == (modes["merged"], modes["proof"])


def test_tick_of_some_ranks_is_on_the_track_of_each(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    info = call("r1-0")
    for ranks in (Ranks(0, 1), Ranks(2, 2)):
        trace.ran(Ran(call_ids=(1,), cost_key="c", rows=1, elapsed_s=1.0, is_timed=True, ranks=ranks), [info])
    trace.close()
    events = read(tmp_path / "trace.json")
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == 1}
    assert [(names[tick["tid"]], tick["args"]["ranks"]) for tick in ticks_of(events)] == [
        ("ticks of replica 0", "rank 0"),
        ("ticks of replica 0, rank 2", "ranks 2 to 3"),
        ("ticks of replica 0, rank 3", "ranks 2 to 3"),
    ]


async def test_request_that_was_left_says_so(tmp_path: Path) -> None:
    pipeline, kwargs = build("pixart")
    path = tmp_path / "trace.json"
    config = EngineConfig(device="cpu", trace=str(path))
    async with Engine(config, rank_factory=InlineReplica(pipeline)) as engine:
        await leave_at(engine, params_of(kwargs, num_inference_steps=50), num_events=4)
        await completed(engine, params_of(kwargs))
    left, whole = parts_of(read(path)).values()
    assert left[-1]["name"] == "cancelled"
    assert whole[-1]["name"] == "transfer"


@pytest.mark.parametrize(("place", "problem"), [("none/trace.json", "No such file"), (".", "Is a directory")])
async def test_place_that_can_not_be_written_is_refused_at_the_start(tmp_path: Path, place: str, problem: str) -> None:
    config = EngineConfig(device="cpu", trace=str(tmp_path / place))
    with pytest.raises(FieldError, match=rf"trace is .*: {problem}"):
        async with Engine(config, rank_factory=InlineReplica(build("pixart")[0])):
            pass


def test_tracks_of_outputs_are_their_own_and_in_order() -> None:
    ids = [f"r{group}-{output}" for group in (1, 2, 10) for output in (0, 1, 63)]
    tracks = [track_of(request_id) for request_id in ids]
    assert tracks == sorted(set(tracks))


def tick(number: int) -> tuple[Ran, list[CallInfo]]:
    call = CallInfo(
        id=number,
        request_id="r1-0",
        kind="denoise",
        component="transformer",
        merge_key=None,
        cost_key="transformer.forward(4)",
        rows=1,
        step_index=number,
        num_steps=9,
    )
    ran = Ran(call_ids=(number,), cost_key=call.cost_key, rows=1, elapsed_s=0.1, is_timed=True, started_ns=number)
    return ran, [call]


def test_what_the_disk_can_not_keep_up_with_is_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sgld.engine.trace.MAX_WAITING", 0)
    trace = Trace(tmp_path / "trace.json")
    trace.ran(*tick(1))
    trace.close()
    events = read(tmp_path / "trace.json")
    assert not ticks_of(events)
    # Two ticks' worth of events: the tick, the request's name and its part; and the names of tracks before.
    assert events[-1]["args"]["name"] == "5 events were dropped"


def test_place_that_is_gone_ends_only_the_trace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    trace = Trace(folder / "trace.json")
    trace.ran(*tick(1))
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    trace.close()
    assert "can't be written" in caplog.text
