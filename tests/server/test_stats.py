"""How the server does, from the engine's counters."""

import msgspec

from sgld.engine.statistics import CallStatistics, ReplicaStatistics
from sgld.server.stats import sample_of, stats_after

from .fakes import NOTHING


def test_rates_are_of_the_time_between() -> None:
    calls = CallStatistics(name="transformer", kind="denoise", num_ticks=4, num_calls=10, elapsed_s=1.0)
    more = msgspec.structs.replace(calls, num_ticks=8, num_calls=22, elapsed_s=2.5)
    encode = CallStatistics(name="text_encoder", kind="encode", num_ticks=9, num_calls=9, elapsed_s=0.25)
    before = msgspec.structs.replace(NOTHING, calls=(calls,))
    now = msgspec.structs.replace(NOTHING, uptime_s=2.0, num_running=3, calls=(more, encode))

    stats = stats_after(before, now, 100.0)

    assert (stats.batch_size, stats.steps_per_s, stats.busy) == (3.0, 6.0, 0.875)
    assert msgspec.json.encode(sample_of(stats)) == b"[100.0,0,3,3.0,6.0,0.875]"


def test_replicas_are_busy_on_average() -> None:
    calls = CallStatistics(name="transformer", kind="denoise", num_ticks=4, num_calls=10, elapsed_s=1.0)
    replicas = (ReplicaStatistics(is_ready=True, num_queued=0, num_running=1),) * 2
    now = msgspec.structs.replace(NOTHING, uptime_s=1.0, calls=(calls,), replicas=replicas)
    assert stats_after(NOTHING, now, 100.0).busy == 0.5


def test_where_nothing_ran_there_is_no_batch() -> None:
    assert stats_after(NOTHING, NOTHING, 1.0).batch_size == 0.0
