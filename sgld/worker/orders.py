"""What rank 0 and its followers say to one another."""

import pickle
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from sgld.models.lora import LoraLayer
from sgld.parallel import Ranks
from sgld.worker.adapted_layer import Changes
from sgld.worker.calls import CallContext
from sgld.worker.graph_orders import GraphOrder
from sgld.worker.rows import RowAxes
from sgld.worker.wire import Parcel

# What all ranks raise alike they raise at about the same time; who waits longer for the others waits for ever.
AGREE_S = 10.0
RowsOfAdapters = tuple[tuple[str, int], ...]
"""Keys of combinations of adapters, and how many rows each has, in order."""
AdaptersOfRows = tuple[RowsOfAdapters, bool]
"""These, and whether they are applied as where those of the rows differ."""


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
    adapters: AdaptersOfRows | None
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
    """A follower has the model, or goes on after `Agree`."""


@dataclass(frozen=True)
class FollowerFailed:
    """A follower failed, in which message and how; the first is 0 for loading."""

    seq: int
    message: str
    is_out_of_memory: bool = False
    has_lost_graphs: bool = False
    """As in `Done`."""
    num_meetings: int = 0
    """So often it had begun to meet the ranks of its group in that forward."""


@dataclass(frozen=True)
class Part:
    """What came of the rows of a group of ranks."""

    seq: int
    parcel: Parcel


class WireGone(OSError):
    """The process at the other end of a wire is gone."""


def send(wire: Connection, message: Any) -> None:
    """Send a message.

    :raises WireGone: the other end is gone.
    """
    content = pickle.dumps(message)
    try:
        # Not `wire.send`: with it torch puts each tensor into a file of /dev/shm.
        wire.send_bytes(content)
    except OSError as error:
        raise WireGone(str(error)) from None


def receive(wire: Connection) -> Any:
    """The next message; waits for it.

    :raises WireGone: the other end is gone.
    """
    try:
        content = wire.recv_bytes()
    except (EOFError, OSError) as error:
        raise WireGone(str(error)) from None
    return pickle.loads(content)


def portable(context: CallContext) -> CallContext:
    """A context that holds on other ranks: each has a device of its own."""
    is_here = context.default_device.type != "cpu"
    return replace(context, default_device=torch.device(context.default_device.type)) if is_here else context


def random_states(device: torch.device) -> tuple[bytes, ...]:
    """Those of the default generators of a rank."""
    return tuple(generator.get_state().numpy().tobytes() for generator in _generators(device))


def set_random_states(device: torch.device, states: tuple[bytes, ...]) -> None:
    """Have the default generators go on as those of another rank."""
    for generator, state in zip(_generators(device), states, strict=True):
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _generators(device: torch.device) -> list[torch.Generator]:
    of_gpu = [torch.cuda.default_generators[device.index]] if device.type == "cuda" else []
    return [torch.default_generator, *of_gpu]


def on_host(changes: Mapping[str, Changes]) -> dict[str, Changes]:
    """The changes with matrices on the host, from where they are sent."""

    def moved(layer: LoraLayer) -> LoraLayer:
        return replace(
            layer, down=layer.down.cpu(), up=layer.up.cpu(), bias=layer.bias.cpu() if layer.bias is not None else None
        )

    return {name: [(moved(layer), scale) for layer, scale in each] for name, each in changes.items()}
