"""/metrics, as Prometheus reads it."""

from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from sgld.engine.eta import EtaStatistics
from sgld.engine.statistics import CallStatistics, CostStatistics, MergeStatistics
from sgld.events import Cancelled, Queued, Started
from sgld.server.metrics import RequestMetrics

from .fakes import NOTHING, FakeEngine, Running, running
from .test_feed import live_request
from .test_status import completed

ROLE = {"role": "server", "replica": "0"}


async def values(server: Running) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = await server.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(answer.text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


async def test_requests_are_counted_under_sglangs_names(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        await server.post(prompt="a cat", n=2)
        await server.post(prompt="fail out_of_memory")
        await server.http.get("/health_generate")
        found = await values(server)

    total = "sglang:diffusion_requests_total"
    assert found[key(total, **ROLE, status="completed", is_warmup="false")] == 2
    assert found[key(total, **ROLE, status="failed", is_warmup="false")] == 1
    assert found[key(total, **ROLE, status="completed", is_warmup="true")] == 1
    assert found[key("sglang:diffusion_request_latency_seconds_count", **ROLE)] == 3
    assert found[key("sglang:diffusion_queue_time_seconds_count", **ROLE)] == 4
    assert found[key("sgld:steps_total")] == 8 + 1 + 2


async def test_http_requests_are_counted_by_route(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        for name in ("a", "b"):
            await server.http.get(f"/v1/images/{name}")
        await server.http.get("/nowhere/a")
        found = await values(server)

    answered = key("sglang:http_responses_total", endpoint="/v1/images/{id}", method="GET", status_code="404")
    assert found[answered] == 2
    assert found[key("sglang:http_requests_total", endpoint="other", method="GET")] == 1
    assert found[key("sglang:http_requests_active")] == 1


async def test_what_the_engine_knows_is_told(tmp_path: Path) -> None:
    engine = FakeEngine()
    call = CallStatistics(
        name="transformer",
        kind="denoise",
        num_ticks=5,
        num_calls=11,
        elapsed_s=2.0,
        num_merged=2,
        num_reused=4,
        batch_sizes={1: 3, 4: 2},
    )
    engine.counted = msgspec.structs.replace(
        NOTHING,
        num_queued=7,
        num_running=3,
        calls=(call,),
        merging={"transformer": MergeStatistics(mode="merge")},
        etas=(EtaStatistics(told="started", num=3, error_sum=0.5, buckets=(2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0)),),
        costs=(CostStatistics(key="transformer(64)", num_rows=2, variant="graph", elapsed_s=0.5),),
    )
    async with running(tmp_path, engine) as server:
        found = await values(server)

    about = {"component": "transformer", "kind": "denoise"}
    assert found[key("sglang:diffusion_num_queue_reqs", **ROLE)] == 7
    assert found[key("sglang:diffusion_num_running_reqs", **ROLE)] == 3
    assert found[key("sgld:batch_size_bucket", **about, le="3")] == 3
    assert found[key("sgld:batch_size_bucket", **about, le="4")] == 5
    assert found[key("sgld:batch_size_sum", **about)] == 11
    assert found[key("sglang:diffusion_stage_host_latency_seconds_sum", **ROLE, stage="transformer")] == 2.0
    assert found[key("sgld:reused_calls_total", **about)] == 4
    assert found[key("sgld:merge_mode", component="transformer", mode="merge")] == 1
    assert found[key("sgld:forward_cost_seconds", key="transformer(64)", rows="2", variant="graph")] == 0.5
    assert found[key("sgld:eta_error_ratio_sum", told="started")] == 0.5
    assert found[key("sgld:eta_error_ratio_bucket", told="started", le="0.3")] == 2
    assert found[key("sgld:eta_error_ratio_count", told="started")] == 3


async def test_time_in_the_queue_is_counted() -> None:
    registry = CollectorRegistry()
    counted = RequestMetrics(registry)
    live = live_request()
    counted.observe(live, Queued(request_id=live.id, position=0, eta_s=1.5), 10.0)
    counted.observe(live, Started(request_id=live.id), 12.0)
    counted.observe(live, msgspec.structs.replace(completed(), elapsed_s=1.0), 13.0)
    other = live_request(1)
    counted.observe(other, Cancelled(request_id=other.id), 13.0)

    assert registry.get_sample_value("sglang:diffusion_queue_time_seconds_sum", ROLE) == 2.0
