"""Which replica gets a request: pure functions of what each has to do."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sgld.sampling_params import SamplingParams

AdapterSource = tuple[str, float | None]
# What it takes to read an adapter of usual size and bring it onto a GPU, when none was timed.
LOAD_ADAPTER_S = 1.0


@dataclass(frozen=True)
class Load:
    """What a replica has to do.

    :param backlog_s: until all its requests are done; None while that can't be predicted.
    :param adapters: those that its rank has read.
    :param num_queued: requests that haven't started.
    """

    is_ready: bool
    num_requests: int
    backlog_s: float | None
    adapters: frozenset[AdapterSource] = frozenset()
    num_queued: int = 0


def adapters_of(params: SamplingParams) -> frozenset[AdapterSource]:
    """The adapters that a request needs."""
    return frozenset((choice.path, choice.alpha) for choice in params.lora or () if choice.path is not None)


def choose(loads: Sequence[Load], adapters: Collection[AdapterSource] = ()) -> int:
    """The index of the replica where a request is done first.

    1. One that is ready goes before one that loads or was lost.
    2. Least backlog, counting what it takes to read adapters that aren't there.
    3. Where a backlog can't be predicted: fewest requests, then fewest adapters to read.
    """

    def rank(index: int) -> tuple[bool, float, float, int]:
        load = loads[index]
        num_missing = len(set(adapters) - load.adapters)
        if is_predicted:
            return not load.is_ready, (load.backlog_s or 0.0) + LOAD_ADAPTER_S * num_missing, 0.0, index
        return not load.is_ready, load.num_requests, num_missing, index

    is_predicted = all(load.backlog_s is not None for load in loads)
    return min(range(len(loads)), key=rank)


def busiest(loads: Sequence[Load]) -> int | None:
    """The replica from which one without work takes requests; None: nobody who has several has one that waits.

    One that isn't ready gives its only one, too.
    """
    several = [index for index, load in enumerate(loads) if load.num_requests > (1 if load.is_ready else 0)]
    giving = [index for index in several if loads[index].num_queued]
    return max(
        giving,
        key=lambda i: (not loads[i].is_ready, loads[i].backlog_s or 0.0, loads[i].num_requests, -i),
        default=None,
    )
