"""Forwards that go on side by side, each on its own ranks: begun here, and given back when they are over."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from sgld.outcome import Raised, Value, outcome_of
from sgld.parallel import FIRST, Ranks
from sgld.worker import batch, proof
from sgld.worker.axes import CallAxes
from sgld.worker.calls import Call, Stretch
from sgld.worker.clock import HostSpan
from sgld.worker.elastic import Away, ElasticLeader
from sgld.worker.executor import Executor, Tick, cost_key_of
from sgld.worker.invocation import Invocation
from sgld.worker.orders import FollowerFailed
from sgld.worker.trees import values


@dataclass(eq=False)
class Lane:
    """Calls that share a forward, and the ranks that run it.

    `away`: it runs on other ranks; `axes`: of calls that were merged for it. `tick`: it runs here, and the device may
    not be done with it.
    """

    ranks: Ranks
    calls: Sequence[Call]
    away: Away | None = None
    axes: CallAxes | None = None
    tick: Tick | None = None

    def is_over(self) -> bool:
        """Never waits."""
        if self.away is not None:
            return self.away.is_over()
        return self.tick is not None and self.tick.span.is_over()


class Lanes:
    """What the ranks of a replica run at one time.

    On a GPU forwards of rank 0 have a stream of their own, as tasks go on meanwhile whose calls ran elsewhere. Their
    results are given back when the device is done with them. Then nobody reads any more what tasks may free, and what
    tasks have read of results they have read before the next forward begins there, which waits for them.

    :param leader: has other ranks run forwards.
    """

    def __init__(self, executor: Executor, leader: ElasticLeader, device: torch.device) -> None:
        self._executor = executor
        self._leader = leader
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._lanes: list[Lane] = []
        executor.runtime.residency.join = leader.join = self.join

    def __len__(self) -> int:
        return len(self._lanes)

    @property
    def num_ranks(self) -> int:
        return self._leader.num_ranks

    @property
    def waits_on(self) -> list[Any]:
        """What becomes readable when a forward elsewhere is over."""
        return self._leader.waits_on

    @property
    def is_on_device(self) -> bool:
        """Whether one goes on here, which only looking tells."""
        return any(lane.away is None for lane in self._lanes)

    def degree(self, call: Call) -> tuple[int, bool]:
        """So many ranks may share a call, and whether rank 0 must be among them."""
        degree = 0 if isinstance(call, Stretch) else self._leader.max_degree(_invocation(call))
        is_plain = call.site is None and call.context.cache is None and call.around is contextlib.nullcontext
        # What is drawn from one that a task gave must be drawn here.
        is_plain &= not any(isinstance(leaf, torch.Generator) for leaf in values(call.tree))
        return max(degree, 1), not degree or not is_plain

    def on(self, ranks: Ranks) -> AbstractContextManager[None]:
        """While the block runs, these ranks run what is asked for."""
        return self._leader.on(ranks)

    def begin(self, calls: Sequence[Call], ranks: Ranks) -> None:
        """Begin a forward. What isn't plain (a proof, calls that are alike no more) rank 0 runs itself."""
        lane = self._sent(calls, ranks) if ranks.first else Lane(ranks, calls, tick=self._here(calls, ranks))
        self._lanes.append(lane or Lane(ranks, calls, tick=self._instead(calls)))

    def over(self, may_run: Callable[[Call], bool]) -> Iterator[tuple[Lane, Tick | None]]:
        """Forwards that are over by now, and what came of them; None: nothing, so their calls wait as before.

        :param may_run: whether a call that failed elsewhere may run here now.
        """
        for lane in [lane for lane in self._lanes if lane.is_over()]:
            tick = lane.tick if lane.away is None else self._received(lane, lane.away)
            if tick is None and all(map(may_run, lane.calls)):
                tick = self._again(lane)
                if not lane.is_over():
                    continue
            self._lanes.remove(lane)
            yield lane, tick

    def _again(self, lane: Lane) -> Tick:
        """Run here what failed elsewhere. What goes well so several ranks can't share."""
        away, lane.away = lane.away, None
        tick = lane.tick = self._instead(lane.calls)
        assert away is not None
        failed = away.reply if isinstance(away.reply, FollowerFailed) and not away.reply.is_out_of_memory else None
        if failed is not None and away.ranks.num > 1 and all(isinstance(outcome, Value) for outcome in tick.outcomes):
            self._leader.refuse(_invocation(lane.calls[0]), failed.message)
        return tick

    def _instead(self, calls: Sequence[Call]) -> Tick:
        """Run here what is meant for other ranks; its time says nothing of these."""
        return replace(self._here(calls, FIRST), is_timed=False)

    def join(self) -> None:
        """What the device is given from now on comes after forwards that go on here.

        Whoever runs components beside `begin` must, as graphs and what models keep are in memory that all forwards use.
        """
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def _here(self, calls: Sequence[Call], ranks: Ranks) -> Tick:
        with self._leader.on(ranks), self._beside():
            return self._executor.run(calls)

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def _sent(self, calls: Sequence[Call], ranks: Ranks) -> Lane | None:
        """A forward of other ranks; None: it isn't plain, or can't be sent."""
        self._executor.runtime.look()
        first, merged = calls[0], self._executor.proved(calls) if len(calls) > 1 else None
        if len(calls) > 1 and merged is None:
            return None

        def away() -> Any:
            with self._leader.on(ranks), first.random.entered():
                if merged is None:
                    return proof.alone(first)
                return proof.forward(calls, merged[1], merged[0])

        sent = outcome_of(away)
        if isinstance(sent, Raised):
            return None
        return Lane(ranks, calls, sent.value, merged[0] if merged is not None else None)

    def _received(self, lane: Lane, away: Away) -> Tick | None:
        """What came of a forward elsewhere; None: it failed, and not for its only call on a single rank."""
        outcome = outcome_of(away.result)
        if isinstance(outcome, Raised):
            if len(lane.calls) > 1 or away.ranks.num > 1:
                return None
            span = HostSpan()
            return Tick([outcome], span, is_merged=False, is_timed=False, cost_key=lane.calls[0].cost_key)
        done = away.done
        assert done is not None
        if done.random is not None:
            self._leader.drew(lane.calls[0].random, done.random)
        values = [outcome.value]
        if lane.axes is not None:
            split = outcome_of(functools.partial(batch.split, outcome.value, lane.calls, lane.axes))
            if isinstance(split, Raised):
                return None
            values = split.value
        return Tick(
            [Value(value) for value in values],
            HostSpan(done.started_ns, done.elapsed_s),
            is_merged=len(lane.calls) > 1,
            is_timed=done.is_timed,
            cost_key=cost_key_of(lane.calls),
            variant=done.variant,
        )


def lanes_of(executor: Executor, leader: Any, device: torch.device) -> Lanes | None:
    """The lanes of ranks of which each forward has its own; None: they share all of them."""
    return Lanes(executor, leader, device) if isinstance(leader, ElasticLeader) else None


def _invocation(call: Call) -> Invocation:
    return Invocation(call.module, call.method, call.args, call.kwargs, is_exact=call.is_exact)
