"""Forwards side by side: rank 0 runs some on its own ranks, and has other ranks run others meanwhile.

What others run is asked for with `ElasticLeader.run` inside of `on(ranks)`, which returns at once what stands for the
result: `Away`. The first of those ranks answers when it is done. Nobody waits for anybody in between, so no rank is
ever asked for a second forward before it has answered.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from sgld.errors import PipelineFailed
from sgld.messages import Variant
from sgld.outcome import Raised, outcome_of
from sgld.parallel import FIRST, Ranks
from sgld.worker.graph_orders import Obeyed, Refusal
from sgld.worker.invocation import Invocation
from sgld.worker.leader import Leader
from sgld.worker.member import Member, performed
from sgld.worker.orders import AGREE_S, FollowerFailed, Invoke, Order, random_states, send, set_random_states
from sgld.worker.randomness import OwnRandom
from sgld.worker.runtime import Runtime
from sgld.worker.trees import leaves
from sgld.worker.wire import Parcel, Unsendable, packed, space_for, unpacked


@dataclass(frozen=True)
class Done:
    """A forward of other ranks is over: what came of it, when it began, what it took, and how it ran.

    `random`: the states of the default generators, if something was drawn. `obeyed`: what came of a graph that it was
    to capture or compare. `has_lost_graphs`: among these may be some that rank 0 would have it replay.
    """

    seq: int
    parcel: Parcel
    started_ns: int
    elapsed_s: float
    variant: Variant
    is_timed: bool
    random: tuple[bytes, ...] | None
    obeyed: Obeyed | None = None
    has_lost_graphs: bool = False


@dataclass(eq=False)
class Away:
    """A forward that other ranks run.

    `reply`: what the first of them said of it; None: it hasn't, or nobody has listened. `heard`: is told what came of
    its graph. `make_room`: frees what rank 0 can do without.
    """

    leader: "ElasticLeader"
    ranks: Ranks
    reply: Done | FollowerFailed | None = None
    heard: Callable[[Obeyed], None] | None = None
    make_room: Callable[[], object] = lambda: False

    def is_over(self) -> bool:
        """Whether an answer is there; never waits."""
        return self.reply is not None or self.leader.has_answer(self)

    def result(self) -> Any:
        """What it returned; waits for it.

        :raises torch.OutOfMemoryError: memory was too small.
        :raises PipelineFailed: it failed there.
        """
        return self.leader.result(self)

    @property
    def done(self) -> Done | None:
        """When it was over, if it went well."""
        return self.reply if isinstance(self.reply, Done) else None


class ElasticLeader(Leader):
    """Rank 0 of ranks that share each forward as it pays. Where nothing is said, it runs alone."""

    def __init__(self, member: Member, note: Any) -> None:
        super().__init__(member, note)
        self._on = FIRST
        self._away: dict[int, Away] = {}
        """By the rank that answers."""
        self._has_lost = False
        """One of the ranks has lost graphs of what ranks share."""
        self._unshared: set[tuple[object, ...]] = set()
        """Calls that several ranks can't share: the component, and shapes without the batch axis."""

    @property
    def num_ranks(self) -> int:
        return self._member.seat.num_ranks

    @property
    def is_elsewhere(self) -> bool:
        return self._on.first > 0

    @contextlib.contextmanager
    def on(self, ranks: Ranks) -> Iterator[None]:
        """While the block runs, these ranks run what is asked for."""
        outer, self._on = self._on, ranks
        try:
            yield
        finally:
            self._on = outer

    def max_degree(self, invocation: Invocation) -> int:
        """So many ranks can share it, as far as is known; 0: only rank 0 can run it."""
        if not self.shares(invocation):
            return 0
        name = self._names[invocation.module]
        degree = 1 if invocation.is_exact else self._member.max_degree(name)
        return 1 if degree > 1 and self._unshared and self._sizes(invocation) in self._unshared else degree

    def run(self, invocation: Invocation, runtime: Runtime) -> Any:
        """Run it on the chosen ranks; without rank 0 it returns `Away` at once.

        What several ranks can't share rank 0 runs alone, then and from then on.

        :raises PipelineFailed: it can't be run on several ranks.
        """
        if self._on == FIRST or (self._on.first == 0 and self.changed_by is not None):
            return self._member.run_alone(invocation, runtime)
        if self._on.first:
            return self._sent(invocation, runtime)
        self._see_what_is_lost(runtime)
        shared = outcome_of(functools.partial(super().run, invocation, runtime), passes=(torch.OutOfMemoryError,))
        if not isinstance(shared, Raised):
            return shared.value
        result = self._member.run_alone(invocation, runtime)
        self.refuse(invocation, f"{type(shared.error).__name__}: {shared.error}")
        return result

    def _see_what_is_lost(self, runtime: Runtime) -> None:
        """Before ranks are told to replay a graph: hear of each whether it still has its own."""
        for rank in self._followers(self._on):
            if rank in self._away:
                self._listen(self._away[rank])
        if self._has_lost and runtime.graphs is not None:
            runtime.graphs.lose_shared()
        self._has_lost = False

    def refuse(self, invocation: Invocation, problem: str) -> None:
        """Several ranks can't share such invocations."""
        self._unshared.add(self._sizes(invocation))
        self._note(
            self._names[invocation.module], f"some calls run on one rank each: {' '.join(problem.split())[:200]}"
        )

    def _sizes(self, invocation: Invocation) -> tuple[object, ...]:
        tensors = (leaf for _, leaf in leaves(invocation.tree) if isinstance(leaf, torch.Tensor))
        return (self._names[invocation.module], *(tuple(tensor.shape[1:]) for tensor in tensors))

    def _invoke(self, invocation: Invocation, parcel: Parcel) -> Invoke:
        fixed = invocation.fixed if self._on.first and self._on.num == 1 else None
        return replace(super()._invoke(invocation, parcel), ranks=self._on, fixed=fixed)

    def _sent(self, invocation: Invocation, runtime: Runtime) -> Away:
        if self.changed_by is not None:
            raise PipelineFailed(f"the pipeline changes its models while it runs ({self.changed_by})")
        try:
            parcel, buffer = packed(invocation.tree, self._member.device)
        except Unsendable as error:
            raise PipelineFailed(f"{error}, which other ranks can't be given") from None
        self._seq += 1
        invoke, heard = replace(self._invoke(invocation, parcel), seq=self._seq), None
        if self._on.num > 1 and not self._member.is_tiled(invoke.component):
            self._see_what_is_lost(runtime)
            invoke = replace(invoke, graph=runtime.order(invocation, None, self._on))
        if invoke.graph is not None and runtime.graphs is not None:
            heard = functools.partial(runtime.graphs.heard, invoke.graph, invocation.module, invocation.method)
        self._tell(invoke, self._on)
        if buffer is not None:
            dist.send(buffer, dst=self._on.first)
        make_room = functools.partial(runtime.make_room, invocation.module)
        away = self._away[self._on.first] = Away(self, self._on, None, heard, make_room)
        return away

    def drew(self, random: OwnRandom, states: tuple[bytes, ...]) -> None:
        """Another rank drew for a task."""
        with random.entered():
            set_random_states(self._member.device, states)

    def has_answer(self, away: Away) -> bool:
        """Whether the first of the ranks has answered, or another one has failed."""
        return any(self._wires[rank - 1].poll() for rank in away.ranks.every)

    def result(self, away: Away) -> Any:
        """The result of a forward of other ranks; as `Away.result`."""
        self._listen(away)
        if isinstance(away.reply, FollowerFailed):
            if away.reply.is_out_of_memory:
                raise torch.OutOfMemoryError(away.reply.message)
            raise PipelineFailed(away.reply.message)
        assert away.reply is not None
        parcel, device = away.reply.parcel, self._member.device
        try:
            buffer = _space(parcel, device, away.make_room)
        except torch.OutOfMemoryError as error:
            self._give_up(f"rank 0 has no room for what rank {away.ranks.first} sends: {error}")
        if buffer is not None:
            dist.recv(buffer, src=away.ranks.first)
        return unpacked(parcel, buffer, device)

    def _listen(self, away: Away) -> None:
        """Wait for what the first of the ranks says. If another one fails, it must fail, too."""
        first = away.ranks.first
        if away.reply is not None:
            return
        own = self._wires[first - 1]
        while not own.poll(0.01):
            if any(self._wires[rank - 1].poll() for rank in away.ranks.every if rank != first):
                away.reply = self._heard(first, AGREE_S)
                break
        if away.reply is None:
            away.reply = self._heard(first)
        del self._away[first]
        self._has_lost |= away.reply.has_lost_graphs
        if away.heard is not None:
            # Where it failed it may have been the graph.
            failed = Obeyed(Refusal(is_passing=True))
            away.heard(failed if isinstance(away.reply, FollowerFailed) else away.reply.obeyed or Obeyed())
        if isinstance(away.reply, FollowerFailed):
            self._see_that_all_failed(away.ranks, away.reply)

    def _see_that_all_failed(self, ranks: Ranks, failed: FollowerFailed) -> None:
        for rank in ranks.every[1:]:
            reply = self._heard(rank, AGREE_S)
            if not isinstance(reply, FollowerFailed):
                self._give_up(f"rank {ranks.first} failed, and rank {rank} didn't")
            if reply.num_meetings != failed.num_meetings:
                self._give_up(f"rank {rank} failed at another place than rank {ranks.first}: {reply.message}")

    def _tell(self, order: Order, ranks: Ranks | None = None) -> None:
        # Who is told something while it has an answer, waits with it; neither would go on if both are large.
        for rank in self._followers(ranks):
            if rank in self._away:
                self._listen(self._away[rank])
        super()._tell(order, ranks)

    @property
    def waits_on(self) -> list[Any]:
        """What becomes readable when there is news of a forward elsewhere."""
        return [self._wires[rank - 1] for away in self._away.values() for rank in away.ranks.every]


def serve(member: Member, invoke: Invoke, runtime: Runtime) -> None:
    """A follower's share of a forward without rank 0. What fails here is told, and the next one may go well."""
    [wire], before = member.seat.wires, member.num_meetings
    outcome = outcome_of(functools.partial(_served, member, invoke, runtime))
    if isinstance(outcome, Raised):
        problem = f"{type(outcome.error).__name__}: {outcome.error}"[:2000]
        is_out_of_memory = isinstance(outcome.error, torch.OutOfMemoryError)
        num_met = member.num_meetings - before
        send(wire, FollowerFailed(invoke.seq, problem, is_out_of_memory, _has_lost_graphs(runtime), num_met))
    elif outcome.value is not None:
        done, buffer = outcome.value
        send(wire, replace(done, has_lost_graphs=_has_lost_graphs(runtime)))
        if buffer is not None:
            dist.send(buffer, dst=0)


def _served(member: Member, invoke: Invoke, runtime: Runtime) -> tuple[Done, torch.Tensor | None] | None:
    """The answer of the first of the ranks, and the tensors that belong to it."""
    assert invoke.ranks is not None
    ranks, device = invoke.ranks, member.device
    is_first = member.seat.index == ranks.first
    module = member.components[invoke.component]
    try:
        buffer = _space(invoke.parcel, device, functools.partial(runtime.make_room, module))
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"rank {member.seat.index} has no room for what rank 0 sends: {error}") from None
    if buffer is not None:
        if is_first:
            dist.recv(buffer, src=0)
        if ranks.num > 1:
            dist.broadcast(buffer, src=ranks.first, group=member.groups[ranks])
    settle(device)
    num_irregular, started_ns = runtime.num_irregular, time.monotonic_ns()
    result = performed(member, invoke, buffer, runtime)
    if not is_first:
        return None
    settle(device)
    elapsed_s = (time.monotonic_ns() - started_ns) / 1e9
    parcel, buffer = packed(result, device)
    states, is_timed = random_states(device), runtime.num_irregular == num_irregular
    random = states if states != invoke.random else None
    obeyed = runtime.graphs.obeyed if runtime.graphs is not None and invoke.graph is not None else None
    return Done(invoke.seq, parcel, started_ns, elapsed_s, runtime.variant, is_timed, random, obeyed), buffer


def _space(parcel: Parcel, device: torch.device, make_room: Callable[[], object]) -> torch.Tensor | None:
    """Where what is on its way is put; who doesn't receive it would take it for what comes next.

    :param make_room: frees what there may be no room beside.
    :raises torch.OutOfMemoryError: nothing helps.
    """
    found = outcome_of(functools.partial(space_for, parcel, device), catches=torch.OutOfMemoryError)
    if not isinstance(found, Raised):
        return found.value
    make_room()
    return space_for(parcel, device)


def _has_lost_graphs(runtime: Runtime) -> bool:
    return runtime.graphs is not None and runtime.graphs.take_loss()


def settle(device: torch.device) -> None:
    """Wait until the device is done with everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
