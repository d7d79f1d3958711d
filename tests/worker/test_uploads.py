"""What forwards take from the host to the device, on a device that isn't there: graphs of it return what they do."""

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from pipelines import build
from torch import nn

from sgld.worker.graph_keys import Key
from sgld.worker.graph_policy import CAPTURES_AFTER, Decision, GraphPolicy
from sgld.worker.graphs import Graphs
from sgld.worker.invocation import Invocation, Tree
from sgld.worker.trees import opened, rebuilt, values
from worker.pretend import DEVICE, Device, DeviceRecorder, OnDevice, moved
from worker.requests import Function, request


class World:
    """Graphs on that device, and what is said of them."""

    def __init__(self) -> None:
        self.device = Device()
        self.recorder = DeviceRecorder(self.device)
        self.notes: list[str] = []
        policy: GraphPolicy[Key] = GraphPolicy(2**30)
        self.graphs = Graphs(DEVICE, policy, self.recorder, {}, lambda _name, note: self.notes.append(note))

    @torch.no_grad()
    def run(self, module: nn.Module, tree: Tree, key: object = 0) -> Any:
        """The result of a call, however it ran, and that of an eager one."""
        there = rebuilt(tree, lambda _path, leaf: OnDevice(leaf.clone()) if isinstance(leaf, torch.Tensor) else leaf)
        args, kwargs = there
        tensors = [leaf for leaf in values(there) if isinstance(leaf, torch.Tensor)]
        of = Key(module, "forward", ("eager", key), (), ())
        with self.device:
            eager = Invocation(module, "forward", *rebuilt(there, lambda _path, leaf: leaf)).plain()
            result = self.graphs.perform(
                self.graphs.decide(of), of, Invocation(module, "forward", args, kwargs), tensors
            )
        pairs = zip(tensors_of(result), tensors_of(eager), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        return result


def tensors_of(result: Any) -> list[torch.Tensor]:
    return [leaf.on_host for leaf in values(opened(result)) if isinstance(leaf, OnDevice)]


def ran(module: nn.Module, times: int = CAPTURES_AFTER + 3) -> World:
    """What becomes of calls of a module with arguments that differ."""
    world = World()
    for n in range(times):
        world.run(module, ((torch.arange(4.0) + n,), {}))
    return world


class Table(nn.Module):
    """Keeps a table on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(16.0).reshape(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for row in self.table:
            x = x + row.to(x.device)
        return x


def indexed(x: torch.Tensor) -> torch.Tensor:
    return x[torch.tensor([3, 1, 1])]


def written(x: torch.Tensor) -> torch.Tensor:
    """The copy is changed after it was made."""
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0]).to(x.device)
    weights.mul_(x)
    return weights + torch.tensor([1.0, 2.0, 3.0, 4.0]).to(x.device)


def filled(x: torch.Tensor) -> torch.Tensor:
    made = torch.zeros(2, 4, device=x.device)
    made[0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    made[1, 1] = torch.tensor(5.0)
    return made * x


@pytest.mark.parametrize(
    "module",
    [
        Function(lambda x: x * torch.tensor([2.0] * 4).to(x.device)),
        Function(lambda x: x * torch.tensor([2.0] * 4, device=x.device)),
        Function(lambda x: x * torch.tensor([2, 3, 4, 5]).to(x.device, torch.float64)),
        Function(indexed),
        Function(written),
        Function(filled),
        Table(),
    ],
)
def test_what_is_the_same_each_time_is_a_constant(module: nn.Module) -> None:
    world = ran(module)
    assert (world.notes, world.graphs.num_replays) == ([], 2)


def counted() -> Callable[[torch.Tensor], torch.Tensor]:
    numbers = count()
    return lambda x: x * 0 + torch.tensor([float(next(numbers) // 2)] * 4).to(x.device)


def alternating() -> Callable[[torch.Tensor], torch.Tensor]:
    """Differs in what it takes to the device once it is captured, and not in what it returns."""
    numbers = count()
    return lambda x: x + 0 * torch.tensor([float(next(numbers) // 6)] * 4).to(x.device)


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (counted(), "something else"),
        (alternating(), "copies something else to the device"),
        (lambda x: x * torch.tensor([x.sum().item()] * 4).to(x.device), "the host needs"),
        (lambda x: x * torch.tensor(x.tolist()).to(x.device), "the host needs"),
        (lambda x: x.cpu().to(x.device), "the host needs"),
        (lambda x: x * x.nonzero().shape[0], "crosses the border"),
    ],
)
def test_what_changes_or_comes_from_arguments_is_refused(
    function: Callable[[torch.Tensor], torch.Tensor], problem: str
) -> None:
    module, world = Function(function), World()
    with world.device, torch.no_grad():
        for n in range(CAPTURES_AFTER + 4):
            x = OnDevice(torch.arange(4.0) + n)
            key = Key(module, "forward", ("eager", 0), (), ())
            world.graphs.perform(world.graphs.decide(key), key, Invocation(module, "forward", (x,), {}), [x])
    assert world.graphs.num_replays == 0
    assert problem in world.notes[0]


def test_another_form_is_watched_before_it_is_captured() -> None:
    """The capture that fails first is made once for a method."""
    world, module = World(), Table()
    for key in (0, 1):
        before = world.recorder.num_records
        for n in range(CAPTURES_AFTER + 2):
            world.run(module, ((torch.arange(4.0) + n,), {}), key)
        assert world.recorder.num_records - before == 2 - key
    assert world.graphs.num_replays == 2


def calls_of(name: str, component: str) -> tuple[nn.Module, list[Tree]]:
    """A component of a tiny pipeline, and what it is called with."""
    pipeline, kwargs = build(name)
    module, calls = getattr(pipeline, component), []

    def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(
            rebuilt((args, kwargs), lambda _path, leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf)
        )

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    pipeline(**request(name, 0, kwargs, num_inference_steps=2))
    handle.remove()
    return moved(module), calls


@pytest.mark.parametrize(("name", "component"), [("chroma", "transformer"), ("sana", "text_encoder")])
def test_models_that_take_tensors_of_the_host_are_replayed(name: str, component: str) -> None:
    module, calls = calls_of(name, component)
    world = World()
    for n in range(CAPTURES_AFTER + 3):
        world.run(module, calls[n % len(calls)])
    assert (world.notes, world.graphs.num_replays) == ([], 2)


def test_a_model_that_reads_its_arguments_is_refused() -> None:
    module, calls = calls_of("lumina2", "transformer")
    world = World()
    for _ in range(CAPTURES_AFTER):
        world.run(module, calls[0])
    assert "the host needs" in world.notes[0]
    assert world.graphs.decide(Key(module, "forward", ("eager", 0), (), ())) is Decision.EAGER
