from typing import Any

import msgspec
from pipelines import build

from engine.streams import completed, ends_of, events_of, leave_at, params_of
from sgld.config import EngineConfig
from sgld.engine.engine import Engine
from sgld.engine.statistics import Statistics, Tally
from sgld.events import Completed
from sgld.messages import CallInfo, Judged, Ran, Stepped, TickMode
from sgld.parallel import Ranks
from sgld.request import Request, RequestState
from sgld.sampling_params import FirstBlockCache, SamplingParams, TaylorCache
from sgld.testing import InlineReplica

CONFIG = EngineConfig(device="cpu")


def call(number: int, request_id: str = "r1-0", **changed: Any) -> CallInfo:
    fields: dict[str, Any] = {"kind": "denoise", "component": "unet", "merge_key": "k", "cost_key": "unet.forward(4)"}
    return CallInfo(id=number, request_id=request_id, rows=2, step_index=0, num_steps=4, **{**fields, **changed})


def ran(*call_ids: int, mode: TickMode = "single") -> Ran:
    rows = 2 * len(call_ids)
    return Ran(call_ids=call_ids, cost_key="unet.forward(4)", rows=rows, elapsed_s=0.5, is_timed=True, mode=mode)


def request(request_id: str = "r1-0") -> Request:
    return Request(id=request_id, output_index=0, params=SamplingParams(), arrived_at=0.0)


def test_ticks_are_counted_by_what_ran() -> None:
    tally = Tally(None)
    for number in range(6):
        tally.pending(call(number, f"r{number}-0"))
    for reply in (ran(0), ran(1, 2, mode="proof"), ran(3, 4, 5, mode="merged")):
        tally.ran(reply)
    tally.pending(call(9, cost_key="vae.decode(8)", kind="decode", component="vae"))
    tally.ran(msgspec.structs.replace(ran(9), cost_key="vae.decode(8)"))
    denoise, decode = tally.calls
    assert (denoise.name, denoise.kind, decode.name, decode.kind) == ("unet.forward", "denoise", "vae.decode", "decode")
    assert (denoise.num_ticks, denoise.num_calls, denoise.num_rows, denoise.elapsed_s) == (3, 6, 12, 1.5)
    assert (denoise.num_merged, denoise.num_proofs, denoise.largest_batch) == (1, 1, 3)
    assert denoise.batch_sizes == {1: 1, 3: 1}


def test_ticks_are_counted_by_their_ranks_where_these_are_chosen() -> None:
    tally = Tally(None)
    for number, ranks in enumerate((Ranks(0, 2), Ranks(1, 1), Ranks(0, 1), None)):
        tally.pending(call(number))
        tally.ran(msgspec.structs.replace(ran(number), ranks=ranks))
    assert tally.calls[0].num_ranks == {2: 1, 1: 2}


def test_calls_that_were_answered_with_what_was_known_are_counted() -> None:
    tally = Tally(None)
    for number in range(3):
        tally.pending(call(number, f"r{number}-0"))
    tally.ran(ran(0))
    tally.ran(msgspec.structs.replace(ran(1, 2), num_reused=2))
    assert [(counted.num_calls, counted.num_reused) for counted in tally.calls] == [(3, 2)]


def test_calls_of_requests_that_ended_are_forgotten() -> None:
    tally = Tally(None)
    for number in range(3):
        tally.pending(call(number, f"r{number}-0"))
    tally.ended(request("r0-0"), RequestState.CANCELLED, 1.0)
    tally.restarted(request("r1-0"), 1.0)
    assert list(tally._pending) == [(0, 2)]
    assert tally.num_ended[RequestState.CANCELLED] == 1
    tally.ran(ran(0))
    assert tally.calls == ()


def test_calls_that_a_device_has_are_counted_when_it_is_done() -> None:
    tally = Tally(None)
    tally.pending(call(1))
    tally.launched([1])
    num_before = len(tally.calls)
    tally.ran(ran(1))
    assert num_before == 0
    assert [counted.num_calls for counted in tally.calls] == [1]
    assert tally.lost() == set()


def test_requests_whose_calls_a_lost_device_had_are_known() -> None:
    tally = Tally(None)
    for number in range(3):
        tally.pending(call(number, f"r{number}-0"), replica=number // 2)
    tally.launched([0])
    tally.launched([2], replica=1)
    assert tally.lost() == {"r0-0"}
    assert tally.lost() == set()
    assert tally.lost(replica=1) == {"r2-0"}


def test_verdicts_are_the_last_told() -> None:
    tally = Tally(None)
    tally.judged(Judged(modes={"unet": "interleave"}, reasons={"unet": "it differs"}))
    tally.judged(Judged(modes={"unet": "merge", "vae": "exclusive"}, reasons={"vae": "it is changed"}))
    assert {name: (m.mode, m.reason) for name, m in tally.merging.items()} == {
        "unet": ("merge", None),
        "vae": ("exclusive", "it is changed"),
    }


async def test_statistics_tell_what_the_engine_did() -> None:
    pipeline, kwargs = build("pixart")
    async with Engine(CONFIG, rank_factory=InlineReplica(pipeline)) as engine:
        before = engine.statistics()
        await ends_of(engine, *(params_of(kwargs, num_inference_steps=6, seed=seed) for seed in range(3)))
        await leave_at(engine, params_of(kwargs, num_inference_steps=50), num_events=4)
        await events_of(engine, params_of(kwargs, guidance_rescale=0.5))
        await completed(engine, params_of(kwargs))
        after = engine.statistics()
    assert (before.num_completed, before.calls, before.replicas[0].tensor_queue) == (0, (), None)
    assert (after.num_completed, after.num_cancelled, after.num_failed, after.num_restarts) == (4, 1, 1, 0)
    assert (after.num_queued, after.num_running) == (0, 0)
    assert after.replicas[0].tensor_queue is not None
    assert after.replicas[0].tensor_queue.num_free == after.replicas[0].tensor_queue.num_slots
    assert after.replicas[0].channel is not None
    assert after.replicas[0].channel.num_outgoing == 0
    by_name = {c.name: c for c in after.calls}
    transformer = by_name["transformer.forward"]
    assert transformer.num_calls >= 3 * 6 + 3
    assert transformer.num_ticks < transformer.num_calls
    assert transformer.largest_batch >= 2
    assert 0 < transformer.elapsed_s < after.uptime_s
    assert by_name["vae.decode"].num_calls == 4
    assert after.merging["transformer"].mode == "merge"
    assert {cost.key.partition("(")[0] for cost in after.costs} >= {"transformer.forward", "vae.decode"}


def test_skipped_calls_are_counted_once() -> None:
    tally = Tally(None)
    for request_id, num in (("r1-0", 1), ("r2-0", 4), ("r1-0", 3)):
        tally.stepped(Stepped(request_id=request_id, step=1, num_steps=9, num_skipped_calls=num))
    assert tally.num_skipped_calls == 7
    tally.restarted(request("r1-0"), 1.0)
    tally.stepped(Stepped(request_id="r1-0", step=1, num_steps=9, num_skipped_calls=1))
    assert tally.num_skipped_calls == 8


async def test_step_cache_of_a_request_reaches_the_rank_and_its_skips_come_back() -> None:
    pipeline, kwargs = build("pixart")
    async with Engine(CONFIG, rank_factory=InlineReplica(pipeline)) as engine:
        cached = params_of(kwargs, num_inference_steps=6, cache=TaylorCache(interval=3, warmup_steps=2))
        ends = await ends_of(engine, cached, params_of(kwargs, num_inference_steps=6))
        statistics = engine.statistics()
    assert all(isinstance(end, Completed) for end in ends)
    assert statistics.num_skipped_calls == 3
    assert {call.name: call.num_calls for call in statistics.calls}["transformer.forward"] == 6 + 3


async def test_company_changes_no_bit_of_an_exact_request_with_a_step_cache() -> None:
    pipeline, kwargs = build("pixart")
    cache = FirstBlockCache(threshold=10, warmup_steps=1, max_skips=1)
    exact = params_of(kwargs, num_inference_steps=6, exact=True, cache=cache)
    async with Engine(CONFIG, rank_factory=InlineReplica(pipeline)) as engine:
        alone = await completed(engine, exact)
        ends = await ends_of(engine, exact, params_of(kwargs, num_inference_steps=6, cache=cache))
        statistics = engine.statistics()
    assert isinstance(ends[0], Completed)
    assert (alone.frames == ends[0].frames).all()
    assert statistics.num_skipped_calls == 3 * 3


async def test_statistics_are_json() -> None:
    pipeline, kwargs = build("pixart")
    async with Engine(CONFIG, rank_factory=InlineReplica(pipeline)) as engine:
        await completed(engine, params_of(kwargs))
        statistics = engine.statistics()
    assert msgspec.json.decode(msgspec.json.encode(statistics), type=Statistics) == statistics
