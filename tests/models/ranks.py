"""Processes that share tokens by gloo, of any number of denoisers in turn: to start them takes seconds."""

import functools
import multiprocessing
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from sgld.models.sequence import Sequence
from sgld.models.shared_attention import prepare
from sgld.models.tokens import TokenRanks
from sgld.parallel import ParallelConfig
from sgld.worker.trees import opened, rebuilt

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Given:
    """What a component is given, and its course: forwards of one go through the same layers in the same order."""

    course: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Attending(nn.Module):
    """A model that is nothing but attention among tokens, of which it splits all that it is given."""

    _cp_plan: ClassVar[Any] = {
        "": {
            "query": ContextParallelInput(split_dim=1),
            "key": ContextParallelInput(split_dim=1),
            "value": ContextParallelInput(split_dim=1),
            "mask": ContextParallelInput(split_dim=-1),
        },
        "out": ContextParallelOutput(gather_dim=1),
    }

    def __init__(self) -> None:
        super().__init__()
        inner: Any = nn.Identity()
        inner.processor = Dispatched()
        self.inner = inner
        self.out = nn.Identity()

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None) -> torch.Tensor:
        processor: Any = self.inner.processor
        return self.out(processor(query, key, value, mask))  # type: ignore[no-any-return]


class Dispatched:
    """A processor of attention, as diffusers' are."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> Any:
        return dispatch_attention_fn(
            query,
            key,
            value,
            mask,
            enable_gqa=key.shape[2] != query.shape[2],
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )


@dataclass(frozen=True)
class Group:
    """Ranks that wait for work."""

    wires: tuple[Connection, ...]

    def run(self, component: Any, parallel: ParallelConfig, calls: list[Given]) -> list[list[Any]]:
        """What each rank gets for each call, tensors or the name of an exception and what it says."""
        message = pickle.dumps((component, parallel, calls))
        for wire in self.wires:
            wire.send_bytes(message)
        results = []
        for wire in self.wires:
            assert wire.poll(TIMEOUT_S), "a rank waits for another one"
            results.append(pickle.loads(wire.recv_bytes()))
        return results


@contextmanager
def group(num_ranks: int, folder: Path, device_type: str = "cpu") -> Iterator[Group]:
    """Ranks that live as long as the block."""
    # Models are imported once for all of them; on GPUs nobody may fork what was told of one.
    context: Any = multiprocessing.get_context("forkserver" if device_type == "cpu" else "spawn")
    if device_type == "cpu":
        context.set_forkserver_preload([__name__, "diffusers.models.transformers"])
    pairs = [context.Pipe() for _ in range(num_ranks)]
    ranks = [
        context.Process(target=_serve, args=(wire, rank, num_ranks, folder / "meeting", device_type), daemon=True)
        for rank, (_, wire) in enumerate(pairs)
    ]
    for rank in ranks:
        rank.start()
    for _, wire in pairs:
        wire.close()
    try:
        yield Group(tuple(wire for wire, _ in pairs))
    finally:
        for wire, _ in pairs:
            wire.close()
        for rank in ranks:
            rank.join(TIMEOUT_S)
            rank.kill()


def _serve(wire: Connection, rank: int, num_ranks: int, meeting: Path, device_type: str) -> None:
    torch.set_num_threads(1)
    prepare()
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(str(meeting), num_ranks)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks)
    meshes: dict[tuple[int, int], Any] = {}
    while True:
        try:
            component, parallel, calls = pickle.loads(wire.recv_bytes())
        except EOFError:
            return
        shape = (parallel.ring, parallel.ulysses)
        if shape not in meshes:
            meshes[shape] = dist.device_mesh.init_device_mesh(device_type, shape, mesh_dim_names=("ring", "ulysses"))
        wire.send_bytes(pickle.dumps(_results(component.to(device), meshes[shape], calls, device)))


def _results(component: Any, mesh: Any, calls: list[Given], device: torch.device) -> list[Any]:
    results: list[Any] = []
    try:
        sequence = Sequence(component, TokenRanks.of(mesh))
        with torch.no_grad():
            for call in calls:
                args, kwargs = _on(device, (call.args, call.kwargs))
                forward = functools.partial(component, *args, **kwargs)
                results.append(_on(torch.device("cpu"), opened(sequence.run(call.course, forward))))
    except Exception as error:  # noqa: BLE001 - it is compared by the test
        results.append(f"{type(error).__name__}: {error}")
    return results


def _on(device: torch.device, tree: Any) -> Any:
    return rebuilt(tree, lambda _path, leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf)
