"""One rank among others, and its share of a forward."""

import contextlib
import functools
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from sgld.ipc.seats import Seat
from sgld.models.exchange import HeadExchange, Messages
from sgld.models.load import LoadedModel
from sgld.models.sequence import Sequence
from sgld.models.shared_attention import prepare
from sgld.models.tensor_layers import Team, team_of
from sgld.models.tokens import TokenRanks
from sgld.parallel import ParallelConfig, Ranks
from sgld.worker import rows, subsets, tiles
from sgld.worker.calls import entered
from sgld.worker.graph_orders import Ordered, Refusal, strongest
from sgld.worker.invocation import Invocation
from sgld.worker.orders import AdaptersOfRows, Invoke, RowsOfAdapters, set_random_states
from sgld.worker.runtime import Runtime
from sgld.worker.slots import Slots
from sgld.worker.trees import copied
from sgld.worker.wire import unpacked


class Member:
    """One rank among others: what all of them have, and how it runs its share of a forward."""

    def __init__(self, seat: Seat, model: LoadedModel, parallel: ParallelConfig) -> None:
        device = model.device
        self.seat, self.device = seat, device
        self.components = {name: model.pipeline.components[name] for name in model.sharing.names}
        self.names = {module: name for name, module in self.components.items()}
        self.num_groups = parallel.cfg_degree
        self.group, self.index_in_group = divmod(seat.index, parallel.sp * parallel.tp_size)
        self.slots: dict[str, Slots] = {}
        self.groups = subsets.groups(seat.num_ranks, device) if parallel.elastic_sp else {}
        self._tiled: dict[str, dict[Ranks, tiles.Shapes]] = {name: {} for name in model.sharing.vaes}
        self._max_degrees = dict(model.sharing.max_degrees) if parallel.elastic_sp else {}
        self._sequences: dict[str, Sequence] = {}
        self._exchange: HeadExchange | None = None
        self._teams: dict[str, Team] = {}
        """Of components of which each rank has parts."""
        own_groups = (group for ranks, group in self.groups.items() if seat.index in ranks.every)
        self._all_groups: list[Any] = [dist.group.WORLD, *own_groups]
        if parallel.elastic_sp:
            self._share_tokens([n for n, degree in self._max_degrees.items() if degree > 1], TokenRanks.alone())
        elif parallel.sp * parallel.tp_size > 1:
            mesh = dist.device_mesh.init_device_mesh(
                device.type,
                (parallel.cfg_degree, parallel.ring, parallel.ulysses, parallel.tp_size),
                mesh_dim_names=("cfg", "ring", "ulysses", "tp"),
            )
            self._all_groups += mesh.get_all_groups()
            self._teams = {name: _met(self.components[name], mesh) for name in model.sharing.divided.names}
            if parallel.sp > 1:
                ranks = TokenRanks.of(mesh["ring", "ulysses"])
                self._all_groups.append(ranks.group)
                self._share_tokens(model.sharing.denoisers, ranks)

    @property
    def num_meetings(self) -> int:
        """How often it has begun to meet others until now: neither collectives nor GPUs tell one time from another."""
        # As torch counts them. It has no other name for it.
        begun = [int(each._get_backend(self.device)._get_sequence_number_for_group()) for each in self._all_groups]
        return sum(begun) + (0 if self._exchange is None else self._exchange.num_meetings)

    def _share_tokens(self, names: Iterable[str], ranks: TokenRanks) -> None:
        prepare()
        self._exchange = ranks.exchange
        self._sequences = {name: Sequence(self.components[name], ranks) for name in names}

    def group_of(self, invoke: Invoke) -> Any:
        """The process group of those that run it; None: all do."""
        return self.groups.get(invoke.ranks) if invoke.ranks is not None else None

    def max_degree(self, component: str) -> int:
        """So many ranks can share a call of a component, where they choose that for each."""
        if self.is_tiled(component):
            return self.seat.num_ranks
        return self._max_degrees.get(component, 1)

    def is_tiled(self, component: str) -> bool:
        return component in self._tiled

    def has_parts(self, component: str) -> bool:
        """Whether each rank has parts of its layers."""
        return component in self._teams

    def perform(self, invoke: Invoke, tree: Any, runtime: Runtime) -> Any:
        """Run this rank's share of a forward of the whole arguments; all ranks must."""
        tree, adapters = self.rows_of(invoke, tree, self.group)
        ranks = invoke.ranks or Ranks(0, self.seat.num_ranks)
        invocation = self._invocation(invoke, tree, ranks)
        forward = functools.partial(self._forward, runtime, invoke.component, invocation, ranks)
        slots = self.slots.get(invoke.component)
        with slots.selected(adapters[0], by_row=adapters[1]) if slots and adapters else contextlib.nullcontext():
            sequence = self._sequences.get(invoke.component)
            if sequence is None:
                return forward()
            chosen = self._token_ranks(invoke.ranks) if invoke.ranks is not None else None
            return sequence.run(invocation.course, forward, chosen)

    def rows_of(self, invoke: Invoke, tree: Any, group: int) -> tuple[Any, AdaptersOfRows | None]:
        """The arguments and adapters of the rows of a group."""
        if invoke.rows is None:
            return tree, invoke.adapters
        bounds = invoke.rows.parts(self.num_groups)
        assert bounds is not None
        start, stop = bounds[group]
        adapters = invoke.adapters and (_between(invoke.adapters[0], start, stop), invoke.adapters[1])
        return rows.part(tree, invoke.rows, start, stop), adapters

    def _invocation(self, invoke: Invoke, tree: Any, ranks: Ranks) -> Invocation:
        agree = functools.partial(_agreed, self.groups.get(ranks))
        args, kwargs = tree
        return Invocation(
            self.components[invoke.component],
            invoke.method,
            args,
            kwargs,
            invoke.context.dtype,
            invoke.is_exact,
            invoke.fixed,
            lends=self.seat.index > 0,
            # Of rows that are parted others wait for the result only.
            is_shared=ranks.num > 1
            and any(invoke.component in shared for shared in (self._sequences, self._tiled, self._teams)),
            ordered=Ordered(invoke.graph, agree, is_own=not self.seat.index) if invoke.graph is not None else None,
        )

    def _forward(self, runtime: Runtime, component: str, invocation: Invocation, ranks: Ranks) -> Any:
        # Models take things out of the dicts that they are given, and this may be done once more.
        own = invocation.having(copied(invocation.tree))
        team = self._teams.get(component)
        with self._in_tiles(component, own.module, ranks), team.together() if team else contextlib.nullcontext():
            return runtime.run_here(own)

    def run_alone(self, invocation: Invocation, runtime: Runtime) -> Any:
        """Run it on this rank, which shares it with nobody."""
        sequence = self._sequences.get(self.names[invocation.module])
        forward = functools.partial(runtime.run_here, invocation)
        return forward() if sequence is None else sequence.run(invocation.course, forward, TokenRanks.alone())

    def _token_ranks(self, ranks: Ranks) -> TokenRanks:
        if ranks.num == 1:
            return TokenRanks.alone()
        group = self.groups[ranks]
        index = self.seat.index - ranks.first
        # Side by side with others their graphs would stall one another even more.
        messages = Messages(group.group_name, index, ranks.num)
        return TokenRanks(group, None, messages, 1, ranks.num, index, overlaps=False)

    def _in_tiles(self, component: str, module: nn.Module, ranks: Ranks) -> AbstractContextManager[None]:
        """What is known of a VAE is known to the ranks of a block alike: each block has a memory of its own."""
        if component not in self._tiled or ranks.num == 1:
            return contextlib.nullcontext()
        shapes = self._tiled[component].setdefault(ranks, tiles.Shapes())
        share = functools.partial(self._share, ranks)
        return tiles.shared(module, self.seat.index - ranks.first, ranks.num, shapes, share)

    def _share(self, ranks: Ranks, value: torch.Tensor, owner: int) -> torch.Tensor:
        value = value.contiguous()
        dist.broadcast(value, src=ranks.first + owner, group=self.groups.get(ranks))
        return value


def performed(member: Member, invoke: Invoke, buffer: torch.Tensor | None, runtime: Runtime) -> Any:
    """What a follower's share of a forward returns."""
    tree = unpacked(invoke.parcel, buffer, member.device)
    set_random_states(member.device, invoke.random)
    with entered(invoke.context, member.components[invoke.component]):
        return member.perform(invoke, tree, runtime)


def _agreed(group: Any, refusal: Refusal | None) -> Refusal | None:
    """What any rank of a group has against a graph."""
    said: list[Refusal | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, refusal, group=group)
    return strongest(said)


def _met(component: nn.Module, mesh: DeviceMesh) -> Team:
    """The ranks that have the parts of a component, which know one another now."""
    team = team_of(component)
    assert team is not None, "it was loaded in parts"
    team.meet(mesh["tp"].get_group())
    return team


def _between(all_rows: RowsOfAdapters, start: int, stop: int) -> RowsOfAdapters:
    """Of the adapters of rows those from and to."""
    keys = [key for key, num in all_rows for _ in range(num)]
    return tuple((key, 1) for key in keys[start:stop]) or tuple(all_rows)
