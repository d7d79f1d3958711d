"""Which calls share the forward of the most urgent one, and how long requests take together: pure functions."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

from sgld.engine.cost import Cost
from sgld.engine.demand import Profiles, call_class, seconds_of
from sgld.engine.order import Level
from sgld.engine.remaining import Tracked
from sgld.messages import CallInfo, CallKind


def as_many_as_pay(
    ordered: Sequence[tuple[Level, Tracked]],
    num_requests: int,
    cost: Cost,
    max_batch_size: int,
    able: Collection[int] | None = None,
) -> list[tuple[Tracked, CallInfo]]:
    """The first call of the first request, and those that everybody together gains by if they join it.

    A call that joins makes the forward longer by Δt instead of taking t(1) of its own. All requests that are more
    urgent than its own, in the batch or not, end Δt later. Its own, and all that come after it, end t(1) - Δt earlier.
    So with k more urgent ones among n it joins if k·Δt < (n - k)·(t(1) - Δt). A second call of the first request has
    k = 0: it joins if that saves any time.

    Devices work in tiles, and some numbers of rows run in a faster way than others: a call that doesn't pay by itself
    stays in if with those after it the sum does.

    Where a time isn't known, nothing joins: it is tried in a small batch first.

    :param ordered: the requests with calls that wait, the most urgent first.
    :param num_requests: all that wait or run.
    :param able: the calls that can run where the forward will; None: all.
    """
    head = ordered[0][1]
    batch = [(head, head.calls[min(call_id for call_id in head.calls if able is None or call_id in able)])]
    first = batch[0][1]
    rows, before_s = first.rows, cost.predict(first.cost_key, first.rows)
    gain_s, best_gain_s, best_size = 0.0, 0.0, 1
    for num_ahead, request, call in _candidates(ordered, first, able):
        after_s = cost.predict(first.cost_key, rows + call.rows)
        alone_s = cost.predict(call.cost_key, call.rows)
        if len(batch) == max_batch_size or before_s is None or after_s is None or alone_s is None:
            break
        delta_s = after_s - before_s
        batch.append((request, call))
        rows, before_s = rows + call.rows, after_s
        gain_s += (num_requests - num_ahead) * (alone_s - delta_s) - num_ahead * delta_s
        if gain_s > best_gain_s:
            best_gain_s, best_size = gain_s, len(batch)
    return batch[:best_size]


def all_together(waiting: Sequence[Tracked], max_batch_size: int) -> list[tuple[Tracked, CallInfo]]:
    """Of all calls the one that is furthest from its end, and those that may share its forward.

    So requests that started together stay together.
    """
    stages: dict[CallKind, int] = {"encode": 0, "denoise": 1, "decode": 2}
    every = [(request, call) for request in waiting for call in request.calls.values()]
    first = min(every, key=lambda pair: (stages.get(pair[1].kind, len(stages)), pair[1].step_index, pair[0].number))
    key = first[1].merge_key
    others = [pair for pair in every if pair is not first and key is not None and pair[1].merge_key == key]
    return [first, *others][:max_batch_size]


def _candidates(
    ordered: Sequence[tuple[Level, Tracked]], first: CallInfo, able: Collection[int] | None
) -> Iterator[tuple[int, Tracked, CallInfo]]:
    """The calls that may share a forward with the first one, each with the number of requests before its own."""
    level, head = ordered[0]
    for num_ahead, (other_level, request) in enumerate(ordered):
        if other_level != level or first.merge_key is None:
            return
        if request is not head and (request.is_suspect or head.is_suspect):
            continue
        for call in request.calls.values():
            is_able = able is None or call.id in able
            if call is not first and call.merge_key == first.merge_key and is_able:
                yield num_ahead, request, call


def preparing(
    ordered: Sequence[tuple[Level, Tracked]],
    batch: Sequence[tuple[Tracked, CallInfo]],
    num_requests: int,
    cost: Cost,
    profiles: Profiles,
) -> int | None:
    """The place of a request that should encode before the batch runs, because it would then share its forwards.

    In order of remaining time a newcomer would encode when all before it have ended: too late to share anything. Its e
    seconds of encoding delay the k requests before it by k·e. That pays if it is less than everybody's gain by its
    rows, as in `as_many_as_pay`, for as many steps as it and the longest of the batch have together.
    """
    level, first = ordered[0][0], batch[0][1]
    rows = sum(call.rows for _, call in batch)
    before_s, alone_s = cost.predict(first.cost_key, rows), cost.predict(first.cost_key, first.rows)
    if first.merge_key is None or not before_s or not alone_s:
        return None
    num_calls = max(request.remaining_s or 0.0 for request, _ in batch) / alone_s
    for num_ahead, (other_level, request) in enumerate(ordered):
        if other_level != level:
            break
        step = profiles.step_of(request.demand) if request.is_preparing and not request.is_suspect else None
        if step is None or step[0] != first.cost_key:
            continue
        after_s, own_s = cost.predict(first.cost_key, rows + step[1]), cost.predict(*step[:2])
        encode_s = seconds_of(cost, [(call_class(call), 1) for call in request.calls.values()])
        if after_s is None or own_s is None or encode_s is None:
            continue
        delta_s = after_s - before_s
        gain_s = (num_requests - num_ahead) * (own_s - delta_s) - num_ahead * delta_s
        if gain_s * min(num_calls, step[2]) > num_ahead * encode_s:
            return num_ahead
    return None


def together_s(requests: Sequence[tuple[Tracked, float]], cost: Cost, max_batch_size: int, num_ranks: int = 1) -> float:
    """Seconds until all of these are done, given what each has left; those whose calls merge run together.

    Of n that merge, the one with the most left takes t(1) for each of its calls, the next one t(2) - t(1), and so on.
    Where forwards run side by side each takes its share of the ranks, and none ends earlier than it would alone.
    """
    if num_ranks > 1:
        shares = (
            remaining_s * cost.share(next((call.cost_key for call in request.calls.values()), ""), num_ranks)
            for request, remaining_s in requests
        )
        return max(sum(shares), max((remaining_s for _, remaining_s in requests), default=0.0))
    alone_s = 0.0
    merged: defaultdict[str, list[tuple[float, CallInfo]]] = defaultdict(list)
    for request, remaining_s in requests:
        call = next(iter(request.calls.values()), None)
        if call is None or call.merge_key is None or request.is_suspect:
            alone_s += remaining_s
        else:
            merged[call.merge_key].append((remaining_s, call))
    return alone_s + sum(_merged_s(group, cost, max_batch_size) for group in merged.values())


def _merged_s(group: list[tuple[float, CallInfo]], cost: Cost, max_batch_size: int) -> float:
    total_s = 0.0
    rows, before_s = 0, 0.0
    for index, (remaining_s, call) in enumerate(sorted(group, key=lambda pair: -pair[0])):
        if index % max_batch_size == 0:
            rows, before_s = 0, 0.0
        alone_s, after_s = cost.predict(call.cost_key, call.rows), cost.predict(call.cost_key, rows + call.rows)
        if not alone_s or after_s is None:
            total_s += remaining_s
            continue
        total_s += remaining_s * min(max(after_s - before_s, 0.0) / alone_s, 1.0)
        rows, before_s = rows + call.rows, after_s
    return total_s
