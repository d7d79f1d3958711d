"""Calls, costs and requests for tests of the scheduler."""

from dataclasses import dataclass, field
from itertools import count

from sgld.engine.cost import Cost
from sgld.engine.demand import Demand
from sgld.engine.remaining import Tracked
from sgld.engine.scheduler import Batch, Scheduler
from sgld.messages import CallInfo, CallKind

_ids = count(1)


@dataclass(frozen=True)
class LinearCost:
    """A forward takes `fixed_s` and `row_s` for each row; `by_key` says otherwise for some keys."""

    fixed_s: float = 0.0
    row_s: float = 1.0
    by_key: dict[str, float | None] = field(default_factory=dict)
    version: int = 0

    def predict(self, key: str, rows: int, degree: int = 1) -> float | None:
        if key in self.by_key:
            return self.by_key[key]
        return self.fixed_s + self.row_s * rows

    def estimate(self, key: str, rows: int) -> float | None:
        return self.predict(key, rows)

    def share(self, key: str, num_ranks: int) -> float:
        return 1.0


def call(
    request_id: str,
    *,
    num_steps: int = 10,
    step: int = 0,
    merge_key: str | None = "m",
    cost_key: str = "c",
    kind: CallKind = "denoise",
    rows: int = 1,
    is_exclusive: bool = False,
    max_degree: int = 1,
    is_bound: bool = True,
) -> CallInfo:
    return CallInfo(
        id=next(_ids),
        request_id=request_id,
        kind=kind,
        component="transformer",
        merge_key=merge_key,
        cost_key=cost_key,
        rows=rows,
        step_index=step,
        num_steps=num_steps,
        is_exclusive=is_exclusive,
        max_degree=max_degree,
        is_bound=is_bound,
    )


def tracked(
    name: str,
    remaining_s: float | None = None,
    *,
    arrived_at: float = 0.0,
    priority: int = 0,
    deadline_s: float | None = None,
    calls: tuple[CallInfo, ...] = (),
) -> Tracked:
    """A request that has so much left."""
    request = Tracked(name, ord(name[0]), arrived_at, Demand(priority=priority, deadline_s=deadline_s))
    request.remaining_s = remaining_s
    request.calls = {info.id: info for info in calls}
    return request


def running(cost: Cost, *calls: CallInfo, max_batch_size: int = 16, max_running_requests: int = 32) -> Scheduler:
    """A scheduler with these calls waiting; their requests arrived at time 0 in this order."""
    scheduler = Scheduler(cost, max_batch_size=max_batch_size, max_running_requests=max_running_requests)
    for request_id in dict.fromkeys(info.request_id for info in calls):
        scheduler.add(request_id, 0.0)
    scheduler.admit(0.0)
    for info in calls:
        scheduler.pending(info)
    return scheduler


def batch_of(scheduler: Scheduler, now: float = 0.0) -> Batch:
    batch = scheduler.next_batch(now)
    assert batch is not None
    return batch
