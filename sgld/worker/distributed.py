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
from collections.abc import Callable, Mapping
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
from sgld.outcome import forget_locals
from sgld.parallel import ParallelConfig
from sgld.worker import rows, tiles
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
    """Run a component. `rows`: each group of ranks runs a part of them; `seq` counts these messages."""

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
        self.num_groups = parallel.cfg_degree
        self.group, self.index_in_group = divmod(seat.index, parallel.sp * parallel.tp_size)
        self.slots: dict[str, Slots] = {}
        self._tiled = {name: tiles.Shapes() for name in model.sharing.vaes}
        self._sequences: dict[str, Sequence] = {}
        self._teams: dict[str, Team] = {}
        """Of components of which each rank has parts."""
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
            own = mesh["ring", "ulysses"]
            self._sequences = {n: Sequence(part, parallel, own, device) for n, part in denoisers.items()}

    @property
    def has_sequences(self) -> bool:
        """Whether tokens are shared."""
        return bool(self._sequences)

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
        ordered = Ordered(invoke.graph, _agreed, is_own=not self.seat.index) if invoke.graph is not None else None
        invocation = Invocation(
            module, invoke.method, args, kwargs, dtype, is_exact, is_shared=waits, ordered=ordered, lends=is_part
        )
        forward = functools.partial(self._forward, runtime, invoke.component, invocation)
        slots = self.slots.get(invoke.component)
        with slots.selected(num_rows[0], by_row=num_rows[1]) if slots and num_rows else contextlib.nullcontext():
            sequence = self._sequences.get(invoke.component)
            return forward() if sequence is None else sequence.run(invocation.course, forward)

    def _forward(self, runtime: Runtime, component: str, invocation: Invocation) -> Any:
        # Models take things out of the dicts that they are given, and this may be done once more.
        own = invocation.having(copied(invocation.tree))
        team = self._teams.get(component)
        with self._in_tiles(component, own.module), team.together() if team else contextlib.nullcontext():
            return runtime.run_here(own)

    def _in_tiles(self, component: str, module: nn.Module) -> AbstractContextManager[None]:
        shapes = self._tiled.get(component)
        if shapes is None:
            return contextlib.nullcontext()
        return tiles.shared(module, self.seat.index, self.seat.num_ranks, shapes, self._share)

    def _share(self, value: torch.Tensor, owner: int) -> torch.Tensor:
        value = value.contiguous()
        dist.broadcast(value, src=owner)
        return value


class Leader:
    """Rank 0 of several: what it runs of the shared components, they all run.

    :param note: told what was found out of a component, for people.
    """

    def __init__(self, member: Member, note: Callable[[str, str], None]) -> None:
        self._member = member
        self._wires = member.seat.wires
        self._names = {module: name for name, module in member.components.items()}
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
            random=_random_states(self._member.device),
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
            # Of other rows each rank runs others.
            graph = runtime.order(invocation, invoke.rows and (self._member.num_groups, *invoke.rows.form))
        invoke = replace(invoke, seq=self._seq, graph=graph)
        self._tell(invoke)
        try:
            if buffer is not None:
                dist.broadcast(buffer, src=0)
            result = self._member.perform(invoke, invocation.tree, runtime)
            return result if invoke.rows is None else self._joined(invoke, result)
        except Exception as error:
            forget_locals(error)
            self._agree(error)
            raise

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

    def _tell(self, order: Order) -> None:
        """Ring at all followers. Who has something to say meanwhile has failed where rank 0 didn't."""
        message = pickle.dumps(order)
        for rank, wire in enumerate(self._wires, 1):
            try:
                if wire.poll():
                    self._give_up(f"rank {rank} failed, and rank 0 didn't: {_receive(wire)}")
                wire.send_bytes(message)
            except (EOFError, OSError):
                self._give_up(f"rank {rank} is gone")

    def _agree(self, error: BaseException) -> None:
        """Go on only if all others failed in the same forward, too: else some still wait for the rest of it."""
        for wire in self._wires:
            with contextlib.suppress(OSError):
                _send(wire, Agree(self._seq))
        for rank in range(1, len(self._wires) + 1):
            if not isinstance(self._heard(rank, AGREE_S), Failed):
                self._give_up(f"rank 0 failed, and rank {rank} didn't: {type(error).__name__}: {error}")

    def _heard(self, rank: int, timeout_s: float | None = None) -> Any:
        """What a follower says of the last message."""
        wire = self._wires[rank - 1]
        try:
            if timeout_s is not None and not wire.poll(timeout_s):
                self._give_up(f"rank {rank} is still in a forward in which another failed")
            return _receive(wire)
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
            reply = _receive(wire) if wire.poll(timeout_s) else Failed(0, f"it was silent for {timeout_s:.0f} s")
        except (EOFError, OSError):
            reply = Failed(0, "its process died")
        if isinstance(reply, Failed):
            raise ModelError(f"rank {rank} can't load the model: {reply.message}")
    _join(seat, model.device, timeout_s)
    return Leader(Member(seat, model, config.parallel), note)


def fail(seat: Seat, problem: str) -> None:
    """A follower can't load the model: rank 0 hears why, and this one waits for its end."""
    [wire] = seat.wires
    _send(wire, Failed(0, problem))
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
    _send(wire, Loaded())
    _join(seat, model.device, config.load_timeout_s)
    member = Member(seat, model, config.parallel)
    offloaded = {name: part for name, part in member.components.items() if name in model.offloaded}
    pins, compiled = config.memory.pin_cpu_memory, {member.components[n]: n for n in model.compiled}
    graphs = graphs_on(model.device, config.graphs.max_bytes and sys.maxsize, member.components)
    runtime = Runtime(residency(model.device, offloaded, pins=pins), compiled, graphs=graphs)
    max_slots = config.adapters.max_loras + 1
    member.slots = {name: Slots(part, model.device, max_slots) for name, part in member.components.items()}
    while True:
        try:
            order: Order = _receive(wire)
        except (EOFError, OSError):
            return
        match order:
            case Invoke():
                _obey(member, order, runtime)
            case PutAdapters(component=component, key=key, changes=changes):
                member.slots[component].put(key, changes)
            case RemoveAdapters(component=component, key=key):
                member.slots[component].remove(key)
            case Agree():
                # It succeeded here; rank 0 will see to the rest.
                _send(wire, Loaded())
            case unknown:
                assert_never(unknown)


def _obey(member: Member, invoke: Invoke, runtime: Runtime) -> None:
    [wire] = member.seat.wires
    try:
        buffer = None
        if invoke.parcel.num_bytes:
            buffer = torch.empty(invoke.parcel.num_bytes, dtype=torch.uint8, device=member.device)
            dist.broadcast(buffer, src=0)
        tree = unpacked(invoke.parcel, buffer, member.device)
        _set_random_states(member.device, invoke.random)
        module = member.components[invoke.component]
        with entered(invoke.context, module):
            result = member.perform(invoke, tree, runtime)
        if invoke.rows is not None and member.group and not member.index_in_group:
            parcel, buffer = packed(result, member.device)
            _send(wire, Part(invoke.seq, parcel))
            if buffer is not None:
                dist.send(buffer, dst=0)
    except Exception as error:  # noqa: BLE001 - whatever a component raises, rank 0 is told of it
        forget_locals(error)
        _send(wire, Failed(invoke.seq, f"{type(error).__name__}: {error}"[:2000]))
        if not wire.poll(AGREE_S) or _receive(wire) != Agree(invoke.seq):
            raise SystemExit(f"rank {member.seat.index} failed, and rank 0 didn't: {error!r}") from None


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


def _agreed(refusal: Refusal | None) -> Refusal | None:
    """What any rank has against a graph."""
    said: list[Refusal | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, refusal)
    return next((one for one in said if one is not None), None)


def _met(component: nn.Module, mesh: DeviceMesh) -> Team:
    """The ranks that have the parts of a component, which know one another now."""
    team = team_of(component)
    assert team is not None, "it was loaded in parts"
    team.meet(mesh["tp"].get_group())
    return team


def _send(wire: Connection, message: Any) -> None:
    # Not `wire.send`: with it torch puts each tensor into a file of /dev/shm.
    wire.send_bytes(pickle.dumps(message))


def _receive(wire: Connection) -> Any:
    return pickle.loads(wire.recv_bytes())


def _portable(context: CallContext) -> CallContext:
    """A context that holds on other ranks: each has a device of its own."""
    is_here = context.default_device.type != "cpu"
    return replace(context, default_device=torch.device(context.default_device.type)) if is_here else context


def _random_states(device: torch.device) -> tuple[bytes, ...]:
    return tuple(generator.get_state().numpy().tobytes() for generator in _generators(device))


def _set_random_states(device: torch.device, states: tuple[bytes, ...]) -> None:
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
