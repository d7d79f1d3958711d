"""Captures on a GPU: those that fail must leave nothing behind."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sgld.worker.graph_keys import Key
from sgld.worker.graph_policy import CAPTURES_AFTER, GraphPolicy
from sgld.worker.graphs import Graphs
from sgld.worker.invocation import Invocation
from sgld.worker.recorder import CudaRecorder
from worker.requests import Function

pytestmark = pytest.mark.gpu

MIB = 2**20


class Layers(nn.Module):
    """Enough kernels that a graph pays, and something else in the middle of them."""

    def __init__(self, other: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.other = other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = self.linear(x).relu() + x
        return self.other(x)


class Recorded:
    """Graphs on the GPU, and what is said of them."""

    def __init__(self, max_bytes: int = 2**30) -> None:
        self.notes: list[str] = []
        device = torch.device("cuda")
        policy: GraphPolicy[Key] = GraphPolicy(max_bytes)
        self.graphs = Graphs(device, policy, CudaRecorder(device), {}, lambda _name, note: self.notes.append(note))

    @torch.no_grad()
    def run(self, module: nn.Module, *args: Any, times: int = CAPTURES_AFTER + 3) -> Any:
        for _ in range(times):
            result = self.graphs.run(Invocation(module, "forward", args))
        return result


def on_gpu(other: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> Layers:
    return Layers(other).cuda()


def is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def check_health() -> None:
    """The allocator, the generators and captures work as ever."""
    total = torch.cuda.mem_get_info()[1]
    for share in (0.4, 0.5):
        # The second has room only if the allocator gives back what it kept of the first.
        torch.empty(int(share * total), dtype=torch.uint8, device="cuda")
    torch.rand(2, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    recorded, module, x = Recorded(), on_gpu(), torch.randn(4, 64, device="cuda")
    with torch.no_grad():
        assert torch.equal(recorded.run(module, x), module(x))
    assert recorded.graphs.num_replays > 0
    assert recorded.notes == []


def reads(x: torch.Tensor) -> torch.Tensor:
    return x * x.abs().max().item()


def draws(x: torch.Tensor) -> torch.Tensor:
    return x + torch.randn_like(x)


def selects(x: torch.Tensor) -> torch.Tensor:
    return x[x[:, 0].nonzero()[:, 0]]


def uploads(x: torch.Tensor) -> torch.Tensor:
    return x * torch.tensor([2.0] * 64).to(x)


def follows(x: torch.Tensor) -> torch.Tensor:
    """Takes what it reads to the device again; nothing of that is a constant."""
    return x * torch.tensor([2.0] * 64).to(x) * torch.tensor(x.abs().max().tolist()).to(x)


def makes(x: torch.Tensor) -> torch.Tensor:
    return x * torch.tensor([2.0] * 64, device=x.device) * torch.as_tensor(3, device=x.device)


def picks(x: torch.Tensor) -> torch.Tensor:
    return x[:, torch.tensor([3, 1, 2])]


def exhausts(x: torch.Tensor) -> torch.Tensor:
    return x + torch.empty(2**42 if is_capturing() else 1, device="cuda").sum() * 0


def complains(x: torch.Tensor) -> torch.Tensor:
    if is_capturing():
        raise ValueError("not while it is captured")
    return x


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (reads, "captur"),
        (draws, "random"),
        (selects, "captur"),
        (follows, "the host needs"),
        (exhausts, "out of memory"),
        (complains, "not while it is captured"),
    ],
)
def test_a_capture_that_fails_leaves_nothing_behind(
    other: Callable[[torch.Tensor], torch.Tensor], problem: str
) -> None:
    recorded, module, x = Recorded(), on_gpu(other), torch.randn(4, 64, device="cuda")
    good, y = on_gpu(), torch.randn(3, 64, device="cuda")
    recorded.run(good, y)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = module(x)
        recorded.run(module, x)
        torch.manual_seed(0)
        assert torch.equal(recorded.run(module, x, times=1), expected)
        assert len(recorded.notes) == 1
        assert problem in recorded.notes[0]
        before = recorded.graphs.num_replays
        assert torch.equal(recorded.run(good, y, times=2), good(y))
        assert recorded.graphs.num_replays == before + 2
    check_health()


@pytest.mark.parametrize("other", [uploads, makes, picks])
def test_what_is_the_same_on_the_host_each_time_is_a_constant(other: Callable[[torch.Tensor], torch.Tensor]) -> None:
    recorded, module = Recorded(), on_gpu(other)
    with torch.no_grad():
        for _ in range(CAPTURES_AFTER + 3):
            x = torch.randn(4, 64, device="cuda")
            assert torch.equal(recorded.run(module, x, times=1), module(x))
    assert (recorded.notes, recorded.graphs.num_replays) == ([], 2)
    # What replays is no memory of the host that somebody else has by now.
    gc.collect()
    torch.randn(64 * 64).pin_memory()
    assert torch.equal(recorded.run(module, x, times=1), module(x))
    check_health()


def test_a_capture_without_memory_is_tried_again() -> None:
    has_room: list[bool] = []

    def hungry(x: torch.Tensor) -> torch.Tensor:
        return x + torch.empty(2**42 if is_capturing() and not has_room else 1, device="cuda").sum() * 0

    recorded, module, x = Recorded(), on_gpu(hungry), torch.randn(4, 64, device="cuda")
    recorded.run(module, x, times=CAPTURES_AFTER)
    assert "out of memory" in recorded.notes[0]
    has_room.append(True)
    recorded.run(module, x, times=2 * CAPTURES_AFTER + 2)
    assert recorded.graphs.num_replays == 1


def test_what_is_allocated_by_the_first_call_only_is_no_matter() -> None:
    class Lazy(nn.Module):
        weight: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.weight is None:
                self.weight = torch.eye(64, device="cuda") @ torch.eye(64, device="cuda")
            return x @ self.weight

    lazy = Lazy()
    recorded, module, x = Recorded(), on_gpu(lazy), torch.randn(4, 64, device="cuda")
    with torch.no_grad():
        assert torch.equal(recorded.run(module, x), module(x))
    assert recorded.graphs.num_replays == 2


def test_a_tensor_that_a_model_keeps_stays_what_it_is() -> None:
    kept: list[torch.Tensor] = []

    def keeps(x: torch.Tensor) -> torch.Tensor:
        if is_capturing():
            kept.append(x + 1)
        return x

    recorded, module, x = Recorded(), on_gpu(keeps), torch.randn(4, 64, device="cuda")
    good, y = on_gpu(), torch.randn(4, 64, device="cuda")
    recorded.run(good, y)
    result = recorded.run(module, x)
    assert "keeps tensors" in recorded.notes[0]
    recorded.run(good, y)
    assert torch.equal(kept[0], result + 1)


@torch.no_grad()
def test_forms_of_arguments_come_as_they_are() -> None:
    seen: set[tuple[Any, ...]] = set()

    def noted(x: torch.Tensor, expanded: torch.Tensor, turned: torch.Tensor) -> torch.Tensor:
        seen.add((x.stride(), expanded.stride(), turned.stride()))
        for _ in range(20):
            x = x + expanded * turned
        return x

    recorded, module = Recorded(), Function(noted)
    for _ in range(10):
        x, column, turned = (torch.randn(shape, device="cuda") for shape in ((4, 6), (4, 1), (6, 4)))
        args = x, column.expand(4, 6), turned.T
        assert torch.equal(recorded.run(module, *args, times=1), noted(*args))
    assert recorded.graphs.num_replays > 0
    assert len(seen) == 1


@torch.no_grad()
def test_graphs_take_turns_in_one_pool() -> None:
    recorded, modules = Recorded(), [on_gpu() for _ in range(3)]
    inputs = [torch.randn(rows, 64, device="cuda") for rows in (1, 2, 40)]
    for module in modules:
        for x in inputs:
            recorded.run(module, x)
    before = recorded.graphs.num_replays
    for _ in range(3):
        for module in modules:
            for x in inputs:
                assert torch.equal(recorded.run(module, x + 1, times=1), module(x + 1))
    assert recorded.graphs.num_replays == before + 27


@torch.no_grad()
def test_memory_comes_back_when_graphs_go() -> None:
    def large(x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(64 * MIB, device="cuda", dtype=torch.uint8).sum()

    recorded, module, x = Recorded(), on_gpu(large), torch.randn(4, 64, device="cuda")
    recorded.run(module, x)
    assert recorded.graphs.num_replays > 0
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    assert recorded.graphs.make_room()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= held - 64 * MIB


def test_the_first_capture_may_fail() -> None:
    for other in (follows, reads):
        recorded, module, x = Recorded(), on_gpu(other), torch.randn(4, 64, device="cuda")
        good = on_gpu()
        with torch.no_grad():
            recorded.run(module, x)
            assert torch.equal(recorded.run(good, x), good(x))
        assert recorded.graphs.num_replays == 2
        assert len(recorded.notes) == 1
