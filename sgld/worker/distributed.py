"""Several ranks of one replica: rank 0 has the tasks, the others run the same forwards in the same order.

Rank 0 rings at the wires of the followers, sockets where they wait without a deadline. A process that dies ends its
wires, and the front ends a replica of which a rank hangs. Tensors of the device go from one to the other by NCCL.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import assert_never

import torch
import torch.distributed as dist

from sgld.config import EngineConfig
from sgld.errors import ModelError
from sgld.ipc.seats import Seat
from sgld.models.load import LoadedModel
from sgld.outcome import Raised, outcome_of
from sgld.worker.assembly import runtime_of
from sgld.worker.elastic import ElasticLeader, serve
from sgld.worker.graphs import Graphs, graphs_on
from sgld.worker.leader import Leader
from sgld.worker.member import Member, performed
from sgld.worker.orders import (
    AGREE_S,
    Agree,
    FollowerFailed,
    Invoke,
    Loaded,
    Order,
    Part,
    PutAdapters,
    RemoveAdapters,
    WireGone,
    receive,
    send,
)
from sgld.worker.runtime import Runtime
from sgld.worker.slots import Slots
from sgld.worker.wire import packed, space_for


def lead(seat: Seat, model: LoadedModel, config: EngineConfig, note: Callable[[str, str], None]) -> Leader:
    """Rank 0, when all others have loaded the model.

    :raises ModelError: one of them can't.
    """
    timeout_s = config.load_timeout_s
    for rank, wire in enumerate(seat.wires, 1):
        try:
            reply = receive(wire) if wire.poll(timeout_s) else FollowerFailed(0, f"it was silent for {timeout_s:.0f} s")
        except OSError:
            # No fault of the model, as where rank 0 itself dies: the front sees it, and loads again if it had loaded.
            raise SystemExit(f"rank {rank} died while it loaded the model") from None
        if isinstance(reply, FollowerFailed):
            raise ModelError(f"rank {rank} can't load the model: {reply.message}")
    _join(seat, model.device, timeout_s)
    member = Member(seat, model, config.parallel)
    return (ElasticLeader if config.parallel.elastic_sp else Leader)(member, note)


def fail(seat: Seat, problem: str) -> None:
    """A follower can't load the model: rank 0 hears why, and this one waits for its end."""
    [wire] = seat.wires
    # Mostly rank 0 can't, either, and has said so and left.
    with contextlib.suppress(WireGone):
        send(wire, FollowerFailed(0, problem))
        receive(wire)


def follow(
    seat: Seat, model: LoadedModel, config: EngineConfig, graphs_on: Callable[..., Graphs | None] = graphs_on
) -> None:
    """A follower, from the loaded model until rank 0 is gone.

    :param graphs_on: makes what replays CUDA graphs.
    :raises SystemExit: it can't go on.
    """
    [wire] = seat.wires
    # Whatever it does then; the front says what became of rank 0.
    with contextlib.suppress(WireGone):
        send(wire, Loaded())
        _join(seat, model.device, config.load_timeout_s)
        member = Member(seat, model, config.parallel)
        runtime = runtime_of(model, member.components, config, graphs_on=graphs_on)
        max_slots = config.adapters.max_loras + 1
        member.slots = {name: Slots(part, model.device, max_slots) for name, part in member.components.items()}
        while True:
            _follow(receive(wire), member, runtime)


def _follow(order: Order, member: Member, runtime: Runtime) -> None:
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
            [wire] = member.seat.wires
            send(wire, Loaded())
        case unknown:
            assert_never(unknown)


def _obey(member: Member, invoke: Invoke, runtime: Runtime) -> None:
    """Run its share of a forward; rank 0 is told whatever a component raises.

    :raises SystemExit: it failed, and rank 0 didn't.
    """
    [wire], before = member.seat.wires, member.num_meetings
    obeyed = outcome_of(functools.partial(_obeyed, member, invoke, runtime))
    if not isinstance(obeyed, Raised):
        return
    error = obeyed.error
    problem = f"{type(error).__name__}: {error}"[:2000]
    send(wire, FollowerFailed(invoke.seq, problem, num_meetings=member.num_meetings - before))
    if not wire.poll(AGREE_S) or receive(wire) != Agree(invoke.seq):
        raise SystemExit(f"rank {member.seat.index} failed, and rank 0 didn't: {error!r}")
    send(wire, Loaded())


def _obeyed(member: Member, invoke: Invoke, runtime: Runtime) -> None:
    [wire] = member.seat.wires
    buffer = space_for(invoke.parcel, member.device)
    if buffer is not None:
        dist.broadcast(buffer, src=0, group=member.group_of(invoke))
    result = performed(member, invoke, buffer, runtime)
    if invoke.rows is not None and member.group and not member.index_in_group:
        parcel, buffer = packed(result, member.device)
        send(wire, Part(invoke.seq, parcel))
        if buffer is not None:
            dist.send(buffer, dst=0)


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
