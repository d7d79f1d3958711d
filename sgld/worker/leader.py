"""Rank 0 of several: it tells the others what to run, and sees whether they go on alike."""

import contextlib
import functools
import logging
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from sgld.errors import PipelineFailed
from sgld.outcome import Raised, message_of, outcome_of
from sgld.parallel import Ranks
from sgld.worker import rows
from sgld.worker.adapted_layer import Changes
from sgld.worker.calls import current_context
from sgld.worker.comparison import relative_error
from sgld.worker.invocation import Invocation
from sgld.worker.member import Member
from sgld.worker.orders import (
    AGREE_S,
    Agree,
    FollowerFailed,
    Invoke,
    Order,
    PutAdapters,
    RemoveAdapters,
    on_host,
    portable,
    random_states,
    receive,
    send,
    set_random_states,
)
from sgld.worker.proof import ceiling
from sgld.worker.rows import RowAxes
from sgld.worker.runtime import Runtime
from sgld.worker.slots import Slots
from sgld.worker.wire import Parcel, Unsendable, packed, space_for, unpacked

logger = logging.getLogger(__name__)


class Leader:
    """Rank 0 of several: what it runs of the shared components, they all run.

    :param note: told what was found out of a component, for people.
    """

    def __init__(self, member: Member, note: Callable[[str, str], None]) -> None:
        self._member = member
        self._wires = member.seat.wires
        self._names = member.names
        self._note = note
        self._seq = 0
        self._parts: dict[tuple[object, ...], RowAxes | None] = {}
        """Forms of forwards to the axes by which their rows may be parted, if they may."""
        self.join: Callable[[], None] = lambda: None
        """Has what is launched from now on come after forwards on other streams."""
        self.changed_by: str | None = None
        """What the task that goes on alone does to components, of which followers don't know."""

    @property
    def parts_rows(self) -> bool:
        """Whether groups of ranks share the rows of a forward."""
        return self._member.num_groups > 1

    @property
    def is_elsewhere(self) -> bool:
        """Whether other ranks alone run what is asked for."""
        return False

    def shares(self, invocation: Invocation) -> bool:
        """Whether all ranks run it."""
        name = self._names.get(invocation.module)
        if name is None or self._member.has_parts(name):
            return name is not None
        return invocation.method == ("decode" if self._member.is_tiled(name) else "forward")

    def follow_adapters(self, slots: Mapping[str, Slots]) -> None:
        """From now on followers have the adapters of these components."""
        self._member.slots = {name: slots[name] for name in self._member.components if name in slots}
        for name, of_component in self._member.slots.items():
            put, remove = functools.partial(self._put, name), functools.partial(self._remove, name)
            of_component.follow(put, remove, lambda: self.is_elsewhere, lambda: self.join())

    def _put(self, component: str, key: str, changes: Mapping[str, Changes]) -> None:
        self._tell(PutAdapters(component, key, on_host(changes)))

    def _remove(self, component: str, key: str) -> None:
        self._tell(RemoveAdapters(component, key))

    def run(self, invocation: Invocation, runtime: Runtime) -> Any:
        """Run a component on all ranks.

        :raises PipelineFailed: it can't be run on several ranks.
        """
        if self.changed_by is not None:
            problem = f"the pipeline changes its models while it runs ({self.changed_by}), which followers can't see"
            raise PipelineFailed(f"{problem}; serve it with one GPU for each copy")
        try:
            parcel, buffer = packed(invocation.tree, self._member.device)
        except Unsendable as error:
            raise PipelineFailed(f"{error}, which several GPUs can't share; serve it with one GPU") from None
        invoke = self._invoke(invocation, parcel)
        once = functools.partial(self._run_once, buffer=buffer, invocation=invocation, runtime=runtime)
        axes = invocation.axes
        # The tiles that all ranks share must be of the same rows.
        is_whole = not self.parts_rows or invocation.is_exact or self._member.is_tiled(invoke.component)
        if axes is None or is_whole or axes.parts(self._member.num_groups) is None:
            return once(invoke)
        key = (invoke.component, invoke.method, *axes.form)
        if key in self._parts:
            known = self._parts[key]
            return once(replace(invoke, rows=replace(axes, results=known.results) if known is not None else None))
        whole = once(invoke)
        self._parts[key] = self._proved(whole, rows.completed(axes, whole), invoke, invocation, runtime)
        return whole

    def _invoke(self, invocation: Invocation, parcel: Parcel) -> Invoke:
        """The order for an invocation of all rows."""
        name = self._names[invocation.module]
        slots = self._member.slots.get(name)
        selection = slots.selection if slots is not None else None
        return Invoke(
            seq=0,
            component=name,
            method=invocation.method,
            parcel=parcel,
            context=portable(current_context(dtype=invocation.dtype)),
            is_exact=invocation.is_exact,
            random=random_states(self._member.device),
            adapters=(selection.rows, selection.is_by_row) if selection is not None else None,
            rows=None,
        )

    def _proved(
        self, whole: Any, axes: RowAxes | None, invoke: Invoke, invocation: Invocation, runtime: Runtime
    ) -> RowAxes | None:
        """The axes, if the parts of a forward are together equal to the whole one.

        All ranks run all parts, one after the other: what can't be run so fails on each of them alike.
        """
        if axes is None or axes.parts(self._member.num_groups) is None:
            return None
        error = outcome_of(
            functools.partial(self._error, whole, axes, invoke, invocation, runtime), passes=(torch.OutOfMemoryError,)
        )
        if isinstance(error, Raised):
            self._note(invoke.component, f"rows of its calls can't be shared: {message_of(error.error, 200)}")
            return None
        is_right = error.value <= ceiling(whole)
        said = "are shared by" if is_right else f"differ by {error.value:.2g} (relative) if shared by"
        self._note(invoke.component, f"rows of its calls {said} {self._member.num_groups} groups of ranks")
        return axes if is_right else None

    def _error(self, whole: Any, axes: RowAxes, invoke: Invoke, invocation: Invocation, runtime: Runtime) -> float:
        """How far the results of parts are, together, from the whole one; raises what a part does."""
        results = []
        for group in range(self._member.num_groups):
            tree, adapters = self._member.rows_of(replace(invoke, rows=axes), invocation.tree, group)
            parcel, buffer = packed(tree, self._member.device)
            part, own = replace(invoke, parcel=parcel, adapters=adapters), invocation.having(tree)
            results.append(self._run_once(part, buffer=buffer, invocation=own, runtime=runtime))
        return relative_error(rows.joined(results, axes), whole)

    def _run_once(
        self,
        invoke: Invoke,
        *,
        buffer: torch.Tensor | None,
        invocation: Invocation,
        runtime: Runtime,
        is_again: bool = False,
    ) -> Any:
        self._seq += 1
        graph = None
        if not self._member.is_tiled(invoke.component):
            # Of other rows each rank runs others.
            parts = invoke.rows and (self._member.num_groups, *invoke.rows.form)
            graph = runtime.order(invocation, parts, invoke.ranks)
        invoke = replace(invoke, seq=self._seq, graph=graph)
        self._tell(invoke, invoke.ranks)
        before = self._member.num_meetings
        outcome = outcome_of(functools.partial(self._performed, invoke, buffer, invocation.tree, runtime))
        if isinstance(outcome, Raised):
            self._agree(outcome.error, invoke.ranks, self._member.num_meetings - before)
            is_full = isinstance(outcome.error, torch.OutOfMemoryError) and not is_again
            if not is_full or runtime.graphs is None or not runtime.graphs.lose_shared():
                raise outcome.error
            # A rank can't free graphs of what all share by itself.
            set_random_states(self._member.device, invoke.random)
            return self._run_once(invoke, buffer=buffer, invocation=invocation, runtime=runtime, is_again=True)
        return outcome.value

    def _performed(self, invoke: Invoke, buffer: torch.Tensor | None, tree: Any, runtime: Runtime) -> Any:
        if buffer is not None:
            dist.broadcast(buffer, src=0, group=self._member.group_of(invoke))
        result = self._member.perform(invoke, tree, runtime)
        return result if invoke.rows is None else self._joined(invoke, result)

    def _joined(self, invoke: Invoke, result: Any) -> Any:
        """The result of all rows."""
        assert invoke.rows is not None
        parts = [result]
        size = self._member.seat.num_ranks // self._member.num_groups
        for rank in range(size, self._member.seat.num_ranks, size):
            reply = self._heard(rank)
            if isinstance(reply, FollowerFailed):
                self._give_up(f"rank {rank} failed, and rank 0 didn't: {reply.message}")
            buffer = space_for(reply.parcel, self._member.device)
            if buffer is not None:
                dist.recv(buffer, src=rank)
            parts.append(unpacked(reply.parcel, buffer, self._member.device))
        return rows.joined(parts, invoke.rows)

    def _followers(self, ranks: Ranks | None) -> list[int]:
        """Those of some ranks; None: of all."""
        return [rank for rank in (ranks or Ranks(0, self._member.seat.num_ranks)).every if rank]

    def _tell(self, order: Order, ranks: Ranks | None = None) -> None:
        """Ring at followers. Who has something to say meanwhile has failed where rank 0 didn't."""
        message = pickle.dumps(order)
        for rank in self._followers(ranks):
            wire = self._wires[rank - 1]
            try:
                if wire.poll():
                    self._give_up(f"rank {rank} failed, and rank 0 didn't: {receive(wire)}")
                wire.send_bytes(message)
            except OSError:
                self._give_up(f"rank {rank} is gone")

    def _agree(self, error: BaseException, ranks: Ranks | None, num_met: int) -> None:
        """Go on only if all others failed at the same place of a forward, too: else some still wait for the rest of it.

        One that failed alone has left when rank 0 fails because of that: it must say that it goes on.

        :param num_met: how often rank 0 had begun to meet others in that forward.
        """
        for rank in self._followers(ranks):
            with contextlib.suppress(OSError):
                send(self._wires[rank - 1], Agree(self._seq))
        # Of each group of ranks, which met one another only.
        num_meetings = {0: num_met}
        size = self._member.seat.num_ranks // self._member.num_groups
        for rank in self._followers(ranks):
            reply = self._heard(rank, AGREE_S)
            if not isinstance(reply, FollowerFailed):
                self._give_up(f"rank 0 failed, and rank {rank} didn't: {type(error).__name__}: {error}")
            if num_meetings.setdefault(rank // size, reply.num_meetings) != reply.num_meetings:
                self._give_up(f"rank {rank} failed at another place than the ranks that it met: {reply.message}")
            self._heard(rank, AGREE_S)

    def _heard(self, rank: int, timeout_s: float | None = None) -> Any:
        """What a follower says of the last message."""
        wire = self._wires[rank - 1]
        try:
            if timeout_s is not None and not wire.poll(timeout_s):
                self._give_up(f"rank {rank} is still in a forward in which another failed")
            return receive(wire)
        except OSError:
            self._give_up(f"rank {rank} is gone")

    def _give_up(self, problem: str) -> Any:
        """End this process, and so the replica: ranks that aren't at the same place can't be brought there."""
        logger.error("the ranks of this replica don't agree any more: %s", problem[:2000])
        os._exit(1)
