"""/metrics in Prometheus' text format: SGLang Diffusion's names, so that its dashboards fit, and `sgld:` ones.

Prompts and ids are never labels: they are private, and there is no end of them.
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from sgld.engine.eta import BOUNDS, EtaStatistics
from sgld.engine.statistics import CallStatistics, Statistics
from sgld.events import AnyEvent, Cancelled, Completed, Failed, Progress, Queued, Started
from sgld.server.edge import Activity
from sgld.server.feed import HIDDEN_KINDS
from sgld.server.requests import LiveRequest
from sgld.server.services import Services, services_of

_LATENCIES_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200)
_NUMS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# SGLang's: which part of a server it is, and which of several.
_ROLE = {"role": "server", "replica": "0"}
# The cheapest first; each geometry has its own, and servers that meet thousands of them exist.
_OF_LORAS = (
    ("sgld:lora_adapters", "LoRA adapters in memory", "num_adapters"),
    ("sgld:lora_adapter_bytes", "memory that they take", "adapter_bytes"),
    ("sgld:lora_slots", "combinations of adapters on the device", "num_slots"),
    ("sgld:lora_slot_bytes", "memory of the device that these take", "slot_bytes"),
)
_MAX_COSTS = 200


class RequestMetrics:
    """What is counted of requests as they go: `observe` hears each event."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = tuple(_ROLE)
        self._ended = Counter(
            "sglang:diffusion_requests", "requests that ended", (*labels, "status", "is_warmup"), registry=registry
        )
        self._latency = Histogram(
            "sglang:diffusion_request_latency_seconds",
            "from arrival to the result",
            labels,
            buckets=_LATENCIES_S,
            registry=registry,
        ).labels(**_ROLE)
        self._queue_time = Histogram(
            "sglang:diffusion_queue_time_seconds",
            "from arrival to the start",
            labels,
            buckets=_LATENCIES_S,
            registry=registry,
        ).labels(**_ROLE)
        self._steps = Counter("sgld:steps", "denoising steps of requests", registry=registry)
        self._arrived: dict[tuple[str, int], float] = {}
        """When outputs that are on their way came."""

    def observe(self, live: LiveRequest, event: AnyEvent, now: float) -> None:
        """Count an event.

        :param now: seconds on any clock.
        """
        key = (live.id, event.output_index)
        arrived_at = self._arrived.get(key, now)
        match event:
            case Queued():
                self._arrived[key] = now
            case Started():
                self._queue_time.observe(now - arrived_at)
            case Progress():
                self._steps.inc()
            case Completed() | Failed() | Cancelled():
                self._arrived.pop(key, None)
                is_warmup = str(live.kind in HIDDEN_KINDS).lower()
                status = type(event).__name__.lower()
                self._ended.labels(**_ROLE, status=status, is_warmup=is_warmup).inc()
                if isinstance(event, Completed):
                    self._latency.observe(event.elapsed_s)


class ServerCollector(Collector):
    """What the engine and the server know, read when it is asked for."""

    def __init__(self, services: Services, activity: Activity) -> None:
        self._services = services
        self._activity = activity

    def collect(self) -> Iterator[Metric]:
        """All of it."""
        statistics = self._services.engine.statistics()
        yield from _of_engine(statistics)
        yield from _of_calls(statistics.calls)
        yield from self._of_server()

    def _of_server(self) -> Iterator[Metric]:
        services, activity = self._services, self._activity
        yield _gauge("sgld:ready", "whether the model is served now", services.engine.model is not None)
        yield _gauge("sgld:sse_clients", "who watches live events", services.feed.num_watchers)
        yield _counter(
            "sgld:sse_dropped", "how often one who watches was so far behind that it began anew", services.feed.num_lost
        )
        yield _gauge("sglang:http_requests_active", "HTTP requests that are being answered", activity.num_active)
        requests = CounterMetricFamily("sglang:http_requests", "HTTP requests", labels=("endpoint", "method"))
        for (endpoint, method), num in sorted(activity.num_requests.items()):
            requests.add_metric((endpoint, method), num)
        yield requests
        labels = ("endpoint", "method", "status_code")
        responses = CounterMetricFamily("sglang:http_responses", "answers", labels=labels)
        for (endpoint, method, status), num in sorted(activity.num_responses.items()):
            responses.add_metric((endpoint, method, str(status)), num)
        yield responses


async def metrics(request: Request) -> Response:
    """GET /metrics."""
    return Response(generate_latest(services_of(request).registry), media_type=CONTENT_TYPE_LATEST)


def _of_engine(statistics: Statistics) -> Iterator[Metric]:
    yield _gauge("sglang:diffusion_num_queue_reqs", "outputs that wait", statistics.num_queued, _ROLE)
    yield _gauge("sglang:diffusion_num_running_reqs", "outputs that run", statistics.num_running, _ROLE)
    yield _counter("sgld:rank_restarts", "ranks that were lost and started again", statistics.num_restarts)
    yield _counter("sgld:skipped_calls", "calls of denoisers that step caches skipped", statistics.num_skipped_calls)
    modes = GaugeMetricFamily("sgld:merge_mode", "1: how calls of a component are merged", labels=("component", "mode"))
    for component, merging in sorted(statistics.merging.items()):
        modes.add_metric((component, merging.mode), 1)
    yield modes
    costs = GaugeMetricFamily(
        "sgld:forward_cost_seconds", "learned time of a forward", labels=("key", "rows", "variant")
    )
    for cost in statistics.costs[:_MAX_COSTS]:
        costs.add_metric((cost.key, str(cost.num_rows), cost.variant), cost.elapsed_s)
    yield costs
    yield _of_etas(statistics.etas)
    for name, said, field in _OF_LORAS:
        family = GaugeMetricFamily(name, said, labels=("replica",))
        for index, replica in enumerate(statistics.replicas):
            family.add_metric((str(index),), getattr(replica.adapters, field))
        yield family
    used = GaugeMetricFamily("sgld:tensor_queue_used_ratio", "how full the queue of pixels is", labels=("replica",))
    for index, replica in enumerate(statistics.replicas):
        if (queue := replica.tensor_queue) is not None:
            used.add_metric((str(index),), 1 - queue.num_free / queue.num_slots)
    yield used


def _of_etas(etas: Iterable[EtaStatistics]) -> Metric:
    family = HistogramMetricFamily(
        "sgld:eta_error_ratio",
        "difference between the seconds that were predicted and those that it took from there, as part of these",
        labels=("told",),
    )
    for eta in etas:
        bounds = [*map(str, BOUNDS), "+Inf"]
        family.add_metric((eta.told,), list(zip(bounds, accumulate(eta.buckets), strict=True)), eta.error_sum)
    return family


def _of_calls(calls: Iterable[CallStatistics]) -> Iterator[Metric]:
    by_call = ("component", "kind")
    counters = {
        "num_ticks": CounterMetricFamily("sgld:forwards", "ticks of a component", labels=by_call),
        "num_calls": CounterMetricFamily("sgld:calls", "calls of a component", labels=by_call),
        "num_merged": CounterMetricFamily("sgld:merged_forwards", "ticks in which calls shared one", labels=by_call),
        "num_proofs": CounterMetricFamily("sgld:proofs", "ticks that checked a shared forward", labels=by_call),
        "num_reused": CounterMetricFamily("sgld:reused_calls", "calls answered with what was known", labels=by_call),
    }
    sizes = HistogramMetricFamily("sgld:batch_size", "calls that shared a forward", labels=by_call)
    of_sglang = HistogramMetricFamily(
        "sglang:diffusion_generation_batch_size", "steps that shared a forward", labels=(*_ROLE, "stop_reason")
    )
    stages = HistogramMetricFamily(
        "sglang:diffusion_stage_host_latency_seconds", "forwards of a component", labels=(*_ROLE, "stage")
    )
    for call in calls:
        labels = (call.name, call.kind)
        for name, family in counters.items():
            family.add_metric(labels, getattr(call, name))
        buckets, total = _buckets(call.batch_sizes), sum(n * num for n, num in call.batch_sizes.items())
        sizes.add_metric(labels, buckets, total)
        if call.kind == "denoise":
            of_sglang.add_metric((*_ROLE.values(), call.name), buckets, total)
        # Their sum and number are known, not how they are spread.
        stages.add_metric((*_ROLE.values(), call.name), [("+Inf", call.num_ticks)], call.elapsed_s)
    yield from (*counters.values(), sizes, of_sglang, stages)


def _buckets(nums: dict[int, int]) -> list[tuple[str, float]]:
    """How many values are at most so large, from how often each occurs."""
    bounds = [(str(bound), sum(num for n, num in nums.items() if n <= bound)) for bound in _NUMS]
    return [*bounds, ("+Inf", sum(nums.values()))]


def _gauge(name: str, what: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    family = GaugeMetricFamily(name, what, labels=tuple(labels or ()))
    family.add_metric(tuple((labels or {}).values()), value)
    return family


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(name, what, value=value)
