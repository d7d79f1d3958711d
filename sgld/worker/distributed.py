"""Several ranks of one replica: rank 0 has the tasks, the others run the same forwards in the same order.

Rank 0 rings at the wires of the followers, sockets where they wait without a deadline. A process that dies ends its
wires, and the front ends a replica of which a rank hangs. Tensors of the device go from one to the other by NCCL.
"""

import contextlib
import functools
import logging
import os
import pickle
import sys
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, assert_never

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from sgld.config import EngineConfig
from sgld.errors import ModelError, PipelineFailed
from sgld.ipc.seats import Seat
from sgld.models.load import LoadedModel
from sgld.models.lora import LoraLayer
from sgld.models.sequence import Sequence
from sgld.models.shared_attention import prepare
from sgld.models.tensor_layers import Team, team_of
from sgld.models.tokens import Ranks as TokenRanks
from sgld.outcome import forget_locals
from sgld.parallel import ParallelConfig, Ranks
from sgld.worker import rows, subsets, tiles
from sgld.worker.adapted_layer import Changes
from sgld.worker.calls import CallContext, current_context, entered
from sgld.worker.comparison import relative_error
from sgld.worker.graph_orders import Order as GraphOrder
from sgld.worker.graph_orders import Ordered, Refusal
from sgld.worker.graphs import Graphs, graphs_on
from sgld.worker.invocation import Invocation
from sgld.worker.proof import ceiling
from sgld.worker.residency import residency
from sgld.worker.rows import RowAxes
from sgld.worker.runtime import Runtime
from sgld.worker.slots import Slots
from sgld.worker.trees import copied
from sgld.worker.wire import Parcel, Unsendable, packed, unpacked

logger = logging.getLogger(__name__)
# What all ranks raise alike they raise at about the same time; who waits longer for the others waits for ever.
AGREE_S = 10.0


@dataclass(frozen=True)
class Invoke:
    """Run a component. `rows`: each group of ranks runs a part of them; `seq` counts these messages.

    `ranks`: where each forward has its own; the first one of them, if it isn't rank 0, returns the result.
    """

    seq: int
    component: str
    method: str
    parcel: Parcel
    context: CallContext
    is_exact: bool
    random: tuple[bytes, ...]
    adapters: tuple[tuple[tuple[str, int], ...], bool] | None
    rows: RowAxes | None
    graph: GraphOrder | None = None
    ranks: Ranks | None = None
    fixed: Hashable | None = None
    """Of a forward of one other rank, which decides for itself what it makes a graph of."""


@dataclass(frozen=True)
class PutAdapters:
    """A combination of adapters comes into a slot."""

    component: str
    key: str
    changes: Mapping[str, Changes]


@dataclass(frozen=True)
class RemoveAdapters:
    """A slot becomes free."""

    component: str
    key: str


@dataclass(frozen=True)
class Agree:
    """Rank 0 failed in this one: did the others?"""

    seq: int


Order = Invoke | PutAdapters | RemoveAdapters | Agree


@dataclass(frozen=True)
class Loaded:
    """A follower has the model."""


@dataclass(frozen=True)
class Failed:
    """A follower failed, in which message and how; the first is 0 for loading."""

    seq: int
    message: str
    is_out_of_memory: bool = False


@dataclass(frozen=True)
class Part:
    """What came of the rows of a group of ranks."""

    seq: int
    parcel: Parcel


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
        self._max_degrees: dict[str, int] = {}
        self._sequences: dict[str, Sequence] = {}
        self._teams: dict[str, Team] = {}
        """Of components of which each rank has parts."""
        if parallel.elastic_sp:
            prepare()
            self._max_degrees = dict(model.sharing.max_degrees)
            self._sequences = {
                name: Sequence(self.components[name], TokenRanks.alone())
                for name, degree in model.sharing.max_degrees.items()
                if degree > 1
            }
            return
        if parallel.sp * parallel.tp_size > 1:
            mesh = dist.device_mesh.init_device_mesh(
                device.type,
                (parallel.cfg_degree, parallel.ring, parallel.ulysses, parallel.tp_size),
                mesh_dim_names=("cfg", "ring", "ulysses", "tp"),
            )
            self._teams = {name: _met(self.components[name], mesh) for name in model.sharing.divided.names}
        if parallel.sp > 1:
            prepare()
            denoisers = {name: self.components[name] for name in model.sharing.denoisers}
            own = TokenRanks.of(mesh["ring", "ulysses"])
            self._sequences = {n: Sequence(part, own) for n, part in denoisers.items()}

    @property
    def has_sequences(self) -> bool:
        """Whether tokens are shared."""
        return bool(self._sequences)

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
        num_rows, is_part = invoke.adapters, invoke.rows is not None or self.seat.index > 0
        if invoke.rows is not None:
            bounds = invoke.rows.parts(self.num_groups)
            assert bounds is not None
            start, stop = bounds[self.group]
            tree = rows.part(tree, invoke.rows, start, stop)
            num_rows = num_rows and (_between(num_rows[0], start, stop), num_rows[1])
        module = self.components[invoke.component]
        # Of rows that are parted others wait for the result only.
        waits = any(invoke.component in shared for shared in (self._sequences, self._tiled, self._teams))
        dtype, is_exact, (args, kwargs) = invoke.context.dtype, invoke.is_exact, tree
        ranks = invoke.ranks or Ranks(0, self.seat.num_ranks)
        agree = functools.partial(_agreed, self.groups.get(ranks))
        ordered = Ordered(invoke.graph, agree, is_own=not self.seat.index) if invoke.graph is not None else None
        invocation = Invocation(
            module,
            invoke.method,
            args,
            kwargs,
            dtype,
            is_exact,
            invoke.fixed,
            is_part,
            is_shared=waits,
            ordered=ordered,
        )
        forward = functools.partial(self._forward, runtime, invoke.component, invocation, ranks)
        slots = self.slots.get(invoke.component)
        with slots.selected(num_rows[0], by_row=num_rows[1]) if slots and num_rows else contextlib.nullcontext():
            sequence = self._sequences.get(invoke.component)
            if sequence is None:
                return forward()
            chosen = self._token_ranks(invoke.ranks) if invoke.ranks is not None else None
            return sequence.run(invocation.course, forward, chosen)

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
        return TokenRanks(group, None, group, 1, ranks.num, self.seat.index - ranks.first)

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
        self.changed_by: str | None = None
        """What the task that goes on alone does to components, of which followers don't know."""

    @property
    def parts_rows(self) -> bool:
        """Whether groups of ranks share the rows of a forward."""
        return self._member.num_groups > 1

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
            of_component.follow(functools.partial(self._put, name), functools.partial(self._remove, name))

    def _put(self, component: str, key: str, changes: Mapping[str, Changes]) -> None:
        self._tell(PutAdapters(component, key, _on_host(changes)))

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
        is_whole = not self.parts_rows or invocation.is_exact
        if axes is None or is_whole or axes.parts(self._member.num_groups) is None:
            return once(invoke)
        key = (invoke.component, invoke.method, *axes.form)
        if key in self._parts:
            known = self._parts[key]
            return once(replace(invoke, rows=replace(axes, results=known.results) if known is not None else None))
        whole = once(invoke)
        self._parts[key] = self._proved(whole, rows.completed(axes, whole), invoke, once)
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
            context=_portable(current_context(dtype=invocation.dtype)),
            is_exact=invocation.is_exact,
            random=random_states(self._member.device),
            adapters=(selection.rows, selection.index is not None) if selection is not None else None,
            rows=None,
        )

    def _proved(
        self, whole: Any, axes: RowAxes | None, invoke: Invoke, once: Callable[[Invoke], Any]
    ) -> RowAxes | None:
        """The axes, if a forward whose rows are parted is equal to a whole one."""
        if axes is None or axes.parts(self._member.num_groups) is None:
            return None
        error = relative_error(once(replace(invoke, rows=axes)), whole)
        is_right = error <= ceiling(whole)
        said = "are shared by" if is_right else f"differ by {error:.2g} (relative) if shared by"
        self._note(invoke.component, f"rows of its calls {said} {self._member.num_groups} groups of ranks")
        return axes if is_right else None

    def _run_once(
        self, invoke: Invoke, *, buffer: torch.Tensor | None, invocation: Invocation, runtime: Runtime
    ) -> Any:
        self._seq += 1
        graph = None
        if not self._member.is_tiled(invoke.component):
            # Of other rows each rank runs others, and other ranks share other groups.
            parts = invoke.rows and (self._member.num_groups, *invoke.rows.form)
            graph = runtime.order(invocation, (parts, invoke.ranks))
        invoke = replace(invoke, seq=self._seq, graph=graph)
        self._tell(invoke, invoke.ranks)
        try:
            if buffer is not None:
                dist.broadcast(buffer, src=0, group=self._group_of(invoke))
            result = self._member.perform(invoke, invocation.tree, runtime)
            return result if invoke.rows is None else self._joined(invoke, result)
        except Exception as error:
            forget_locals(error)
            self._agree(error, invoke.ranks)
            raise

    def _group_of(self, invoke: Invoke) -> Any:
        return self._member.groups.get(invoke.ranks) if invoke.ranks is not None else None

    def _joined(self, invoke: Invoke, result: Any) -> Any:
        """The result of all rows."""
        assert invoke.rows is not None
        parts = [result]
        size = self._member.seat.num_ranks // self._member.num_groups
        for rank in range(size, self._member.seat.num_ranks, size):
            reply = self._heard(rank)
            if isinstance(reply, Failed):
                self._give_up(f"rank {rank} failed, and rank 0 didn't: {reply.message}")
            buffer = None
            if reply.parcel.num_bytes:
                buffer = torch.empty(reply.parcel.num_bytes, dtype=torch.uint8, device=self._member.device)
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
            except (EOFError, OSError):
                self._give_up(f"rank {rank} is gone")

    def _agree(self, error: BaseException, ranks: Ranks | None) -> None:
        """Go on only if all others failed in the same forward, too: else some still wait for the rest of it."""
        for rank in self._followers(ranks):
            with contextlib.suppress(OSError):
                send(self._wires[rank - 1], Agree(self._seq))
        for rank in self._followers(ranks):
            if not isinstance(self._heard(rank, AGREE_S), Failed):
                self._give_up(f"rank 0 failed, and rank {rank} didn't: {type(error).__name__}: {error}")

    def _heard(self, rank: int, timeout_s: float | None = None) -> Any:
        """What a follower says of the last message."""
        wire = self._wires[rank - 1]
        try:
            if timeout_s is not None and not wire.poll(timeout_s):
                self._give_up(f"rank {rank} is still in a forward in which another failed")
            return receive(wire)
        except (EOFError, OSError):
            self._give_up(f"rank {rank} is gone")

    def _give_up(self, problem: str) -> Any:
        """End this process, and so the replica: ranks that aren't at the same place can't be brought there."""
        logger.error("the ranks of this replica don't agree any more: %s", problem[:2000])
        os._exit(1)


def lead(seat: Seat, model: LoadedModel, config: EngineConfig, note: Callable[[str, str], None]) -> Leader:
    """Rank 0, when all others have loaded the model.

    :raises ModelError: one of them can't.
    """
    timeout_s = config.load_timeout_s
    for rank, wire in enumerate(seat.wires, 1):
        try:
            reply = receive(wire) if wire.poll(timeout_s) else Failed(0, f"it was silent for {timeout_s:.0f} s")
        except (EOFError, OSError):
            reply = Failed(0, "its process died")
        if isinstance(reply, Failed):
            raise ModelError(f"rank {rank} can't load the model: {reply.message}")
    _join(seat, model.device, timeout_s)
    member = Member(seat, model, config.parallel)
    if not config.parallel.elastic_sp:
        return Leader(member, note)
    from sgld.worker.elastic import ElasticLeader

    return ElasticLeader(member, note)


def fail(seat: Seat, problem: str) -> None:
    """A follower can't load the model: rank 0 hears why, and this one waits for its end."""
    [wire] = seat.wires
    send(wire, Failed(0, problem))
    with contextlib.suppress(EOFError, OSError):
        wire.recv_bytes()


def follow(
    seat: Seat, model: LoadedModel, config: EngineConfig, graphs_on: Callable[..., Graphs | None] = graphs_on
) -> None:
    """A follower, from the loaded model until rank 0 is gone.

    :param graphs_on: makes what replays CUDA graphs; rank 0 decides which there are.
    :raises SystemExit: it can't go on.
    """
    [wire] = seat.wires
    send(wire, Loaded())
    _join(seat, model.device, config.load_timeout_s)
    member = Member(seat, model, config.parallel)
    offloaded = {name: part for name, part in member.components.items() if name in model.offloaded}
    pins, compiled = config.memory.pin_cpu_memory, {member.components[n]: n for n in model.compiled}
    # What ranks share rank 0 decides; what one runs alone it decides itself.
    max_graph_bytes = config.graphs.max_bytes and (config.graphs.max_bytes if member.groups else sys.maxsize)
    graphs = graphs_on(model.device, max_graph_bytes, member.components)
    runtime = Runtime(residency(model.device, offloaded, pins=pins), compiled, graphs=graphs)
    max_slots = config.adapters.max_loras + 1
    member.slots = {name: Slots(part, model.device, max_slots) for name, part in member.components.items()}
    from sgld.worker.elastic import serve

    while True:
        try:
            order: Order = receive(wire)
        except (EOFError, OSError):
            return
        match order:
            case Invoke(ranks=ranks) if ranks is not None and ranks.first:
                serve(member, order, runtime)
            case Invoke():
                _obey(member, order, runtime)
            case PutAdapters(component=component, key=key, changes=changes):
                member.slots[component].put(key, changes)
            case RemoveAdapters(component=component, key=key):
                member.slots[component].remove(key)
            case Agree():
                # It succeeded here; rank 0 will see to the rest.
                send(wire, Loaded())
            case unknown:
                assert_never(unknown)


def _obey(member: Member, invoke: Invoke, runtime: Runtime) -> None:
    [wire] = member.seat.wires
    try:
        buffer = None
        if invoke.parcel.num_bytes:
            buffer = torch.empty(invoke.parcel.num_bytes, dtype=torch.uint8, device=member.device)
            dist.broadcast(buffer, src=0, group=member.groups.get(invoke.ranks) if invoke.ranks is not None else None)
        result = performed(member, invoke, buffer, runtime)
        if invoke.rows is not None and member.group and not member.index_in_group:
            parcel, buffer = packed(result, member.device)
            send(wire, Part(invoke.seq, parcel))
            if buffer is not None:
                dist.send(buffer, dst=0)
    except Exception as error:  # noqa: BLE001 - whatever a component raises, rank 0 is told of it
        forget_locals(error)
        send(wire, Failed(invoke.seq, f"{type(error).__name__}: {error}"[:2000]))
        if not wire.poll(AGREE_S) or receive(wire) != Agree(invoke.seq):
            raise SystemExit(f"rank {member.seat.index} failed, and rank 0 didn't: {error!r}") from None


def performed(member: Member, invoke: Invoke, buffer: torch.Tensor | None, runtime: Runtime) -> Any:
    """What a follower's share of a forward returns."""
    tree = unpacked(invoke.parcel, buffer, member.device)
    set_random_states(member.device, invoke.random)
    with entered(invoke.context, member.components[invoke.component]):
        return member.perform(invoke, tree, runtime)


def _join(seat: Seat, device: torch.device, timeout_s: float) -> None:
    """Meet the other ranks. They find each other by a file, so no port is taken by somebody else meanwhile."""
    # All are on this host; a name server may give it an address that nobody listens to.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(seat.meeting, seat.num_ranks)  # type: ignore[attr-defined]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=seat.index,
        world_size=seat.num_ranks,
        timeout=timedelta(seconds=timeout_s),
    )


def _agreed(group: Any, refusal: Refusal | None) -> Refusal | None:
    """What any rank of a group has against a graph."""
    said: list[Refusal | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, refusal, group=group)
    return next((one for one in said if one is not None), None)


def _met(component: nn.Module, mesh: DeviceMesh) -> Team:
    """The ranks that have the parts of a component, which know one another now."""
    team = team_of(component)
    assert team is not None, "it was loaded in parts"
    team.meet(mesh["tp"].get_group())
    return team


def send(wire: Connection, message: Any) -> None:
    # Not `wire.send`: with it torch puts each tensor into a file of /dev/shm.
    wire.send_bytes(pickle.dumps(message))


def receive(wire: Connection) -> Any:
    return pickle.loads(wire.recv_bytes())


def _portable(context: CallContext) -> CallContext:
    """A context that holds on other ranks: each has a device of its own."""
    is_here = context.default_device.type != "cpu"
    return replace(context, default_device=torch.device(context.default_device.type)) if is_here else context


def random_states(device: torch.device) -> tuple[bytes, ...]:
    return tuple(generator.get_state().numpy().tobytes() for generator in _generators(device))


def set_random_states(device: torch.device, states: tuple[bytes, ...]) -> None:
    for generator, state in zip(_generators(device), states, strict=True):
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _generators(device: torch.device) -> list[torch.Generator]:
    of_gpu = [torch.cuda.default_generators[device.index]] if device.type == "cuda" else []
    return [torch.default_generator, *of_gpu]


def _between(all_rows: tuple[tuple[str, int], ...], start: int, stop: int) -> tuple[tuple[str, int], ...]:
    """Of the adapters of rows those from and to."""
    keys = [key for key, num in all_rows for _ in range(num)]
    return tuple((key, 1) for key in keys[start:stop]) or tuple(all_rows)


def _on_host(changes: Mapping[str, Changes]) -> dict[str, Changes]:
    def moved(layer: LoraLayer) -> LoraLayer:
        return replace(
            layer, down=layer.down.cpu(), up=layer.up.cpu(), bias=layer.bias.cpu() if layer.bias is not None else None
        )

    return {name: [(moved(layer), scale) for layer, scale in each] for name, each in changes.items()}
