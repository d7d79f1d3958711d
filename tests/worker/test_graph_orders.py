"""Ranks that replay graphs together, as real processes on the CPU with a recorder that runs forwards again."""

import json
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sgld.config import EngineConfig
from sgld.ipc.seats import Seat, seats
from sgld.models.load import LoadedModel
from sgld.models.sharing import Sharing
from sgld.parallel import ParallelConfig
from sgld.worker.distributed import follow, lead
from sgld.worker.graph_orders import GraphOrder, Ordered, Refusal, refusal_of, strongest
from sgld.worker.graph_policy import CAPTURES_AFTER, GraphPolicy
from sgld.worker.graphs import Graphs, graphs_on
from sgld.worker.invocation import Invocation
from sgld.worker.recorder import Broken, CaptureFailed, Full, Leaking, Slow, Unfit
from sgld.worker.runtime import Runtime
from worker.recordings import FakeRecorder, FakeRecording

CPU = torch.device("cpu")
UNTIL_REPLAYED = CAPTURES_AFTER + 1
# Calls of so many elements can't be captured on one rank.
FAILS_ON_FOLLOWER, FAILS_ON_LEADER, IS_FULL_ON_FOLLOWER = 5, 6, 7
DIFFERS_ON_FOLLOWER = 8
TIMEOUT_S = 120.0


class Summing(nn.Module):
    """Twice the sum of what the ranks have."""

    num_forwards = 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_forwards += 1
        x = x.clone()
        dist.all_reduce(x)
        return self.weight * x


class RankRecorder(FakeRecorder):
    """Of one rank, which can't capture everything."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank
        # Each waits for what the other launches.
        self.launch_s = 0.1

    def record(self, forward: Any, tree: Any, tensors: Any) -> FakeRecording:
        num = tensors[0].numel()
        if num == (FAILS_ON_FOLLOWER if self._rank else FAILS_ON_LEADER):
            raise Unfit("this rank can't")
        if num == IS_FULL_ON_FOLLOWER and self._rank and self.num_full == 0:
            self.num_full += 1
            raise Full("out of memory")
        recording = super().record(forward, tree, tensors)
        if num == DIFFERS_ON_FOLLOWER and self._rank:
            replay = recording.replay
            recording.replay = lambda tensors: replay(tensors) + 1  # type: ignore[method-assign]
        return recording

    num_full = 0


def model(module: nn.Module, device: torch.device = CPU) -> LoadedModel:
    pipeline = SimpleNamespace(components={"transformer": module})
    return LoadedModel(pipeline, device, {}, "", sharing=Sharing(denoisers=("transformer",)))


def config() -> EngineConfig:
    return EngineConfig(model_path="x", device="cpu", parallel=ParallelConfig(enable_cfg_parallel=True))


def graphs_of(rank: int, max_bytes: int, components: Any) -> Graphs:
    names = {part: name for name, part in components.items()}
    return Graphs(CPU, GraphPolicy(max_bytes), RankRecorder(rank), names)


def state(graphs: Graphs, module: Any) -> list[int]:
    """How many graphs a rank has, and what it ran."""
    return [len(graphs._recordings), graphs.num_trials, graphs.num_replays, module.num_forwards]


def follower(seat: Seat, told: Connection) -> None:
    own = model(Summing())
    made: list[Graphs] = []

    def make(_device: Any, max_bytes: int, components: Any, _note: Any, *, frees_host: bool) -> Graphs:
        assert not frees_host
        made.append(graphs_of(1, max_bytes, components))
        return made[0]

    follow(seat, own, config(), make)
    told.send_bytes(json.dumps(state(made[0], own.pipeline.components["transformer"])).encode())


def leader(seat: Seat, told: Connection) -> None:
    """Makes calls of several sizes, and tells what came of them."""
    own = model(Summing())
    module = own.pipeline.components["transformer"]
    notes: list[str] = []
    # Room for two graphs: a recording grows the pool by 100 and takes 10, and one of another form was refused.
    graphs = graphs_of(0, 425, {"transformer": module})
    graphs._note = lambda _name, note: notes.append(note)
    runtime = Runtime(graphs=graphs)
    runtime.ranks = lead(seat, own, config(), lambda _name, _note: None)
    results: dict[str, Any] = {}

    @torch.no_grad()
    def call(size: int, times: int) -> tuple[int, bool]:
        """How many of the calls were replayed, and whether all were right."""
        before, is_right = graphs.num_replays, True
        for n in range(times):
            x = torch.full((size,), float(n))
            is_right &= torch.equal(runtime.run(Invocation(module, "forward", (x,), fixed=())), 2 * x)
        return graphs.num_replays - before, is_right

    for name, size, times in (
        ("usual", 2, UNTIL_REPLAYED + 2),
        ("fails on follower", FAILS_ON_FOLLOWER, UNTIL_REPLAYED + 2),
        ("fails on leader", FAILS_ON_LEADER, UNTIL_REPLAYED + 2),
        ("differs on follower", DIFFERS_ON_FOLLOWER, UNTIL_REPLAYED + 2),
        ("full on follower", IS_FULL_ON_FOLLOWER, CAPTURES_AFTER),
        ("full no more", IS_FULL_ON_FOLLOWER, 2 * CAPTURES_AFTER + 2),
        ("evicts", 3, UNTIL_REPLAYED + 1),
        ("evicted", 2, 1),
    ):
        results[name] = call(size, times)
    with torch.no_grad():
        exact = Invocation(module, "forward", (torch.ones(2),), fixed=(), is_exact=True)
        results["exact"] = graphs.num_replays, runtime.run(exact).tolist(), graphs.num_replays
    results["state"], results["notes"] = state(graphs, module), notes
    told.send_bytes(json.dumps(results).encode())


@contextmanager
def telling(meeting: Path, first_rank: Any, second_rank: Any) -> Iterator[tuple[Any, Any]]:
    """What two ranks have to tell, each a process of its own."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    with seats(2, str(meeting)) as (first, second):
        processes = [
            context.Process(target=target, args=(seat, pipe[1]), daemon=True)
            for target, seat, pipe in ((first_rank, first, pipes[0]), (second_rank, second, pipes[1]))
        ]
        for process in processes:
            process.start()
    try:
        assert all(pipe.poll(TIMEOUT_S) for pipe, _ in pipes)
        heard = [json.loads(pipe.recv_bytes()) for pipe, _ in pipes]
        yield heard[0], heard[1]
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """What rank 0 has to tell, and the state of the other rank."""
    with telling(tmp_path_factory.mktemp("ranks") / "meeting", leader, follower) as heard:
        yield heard


def test_all_ranks_replay_what_rank_0_says(told: tuple[dict[str, Any], list[int]]) -> None:
    assert told[0]["usual"] == [2, True]


@pytest.mark.parametrize("where", ["fails on follower", "fails on leader", "differs on follower"])
def test_what_one_rank_refuses_none_replays(told: tuple[dict[str, Any], list[int]], where: str) -> None:
    assert told[0][where] == [0, True]


def test_what_one_rank_had_no_memory_for_is_tried_again(told: tuple[dict[str, Any], list[int]]) -> None:
    assert told[0]["full on follower"] == [0, True]
    assert told[0]["full no more"] == [1, True]


def test_graphs_go_on_all_ranks_when_rank_0_evicts_them(told: tuple[dict[str, Any], list[int]]) -> None:
    assert told[0]["evicts"] == [1, True]
    assert told[0]["evicted"] == [0, True]
    num_graphs, *ran = told[0]["state"]
    assert num_graphs == 2
    assert told[1] == [num_graphs, *ran]


def test_exact_calls_run_eagerly(told: tuple[dict[str, Any], list[int]]) -> None:
    before, result, after = told[0]["exact"]
    assert (result, before) == ([2.0, 2.0], after)


def test_people_hear_why(told: tuple[dict[str, Any], list[int]]) -> None:
    said = [note.removeprefix("some calls run without CUDA graphs: ") for note in told[0]["notes"]]
    assert said[0] == "this rank can't"
    assert "something else" in said[1]
    assert "out of memory" in said[2]


@torch.no_grad()
def test_only_ranks_that_have_a_graph_hear_that_it_is_gone() -> None:
    module = nn.Linear(2, 2)
    graphs = graphs_of(0, 1000, {"transformer": module})
    invocation = Invocation(module, "forward", (torch.ones(1, 2),), fixed=())

    def order(ranks: str) -> GraphOrder:
        made = graphs.order(invocation, "eager", None, ranks)
        assert made is not None
        return made

    for _ in range(UNTIL_REPLAYED):
        graphs.obey(invocation, Ordered(order("01"), lambda refusal: refusal, is_own=True))
    assert graphs.make_room()
    assert order("23").gone == ()
    [(component, method, *_)] = order("01").gone
    assert (component, method) == ("transformer", "forward")
    assert order("01").gone == ()


@torch.no_grad()
def test_a_follower_keeps_what_rank_0_says_whatever_its_own_graphs_need() -> None:
    module = nn.Linear(2, 2)
    recorders = FakeRecorder(), FakeRecorder()
    leader, follower = (Graphs(CPU, GraphPolicy(125), recorder, {module: "transformer"}) for recorder in recorders)
    invocation = Invocation(module, "forward", (torch.ones(1, 2),), fixed=())

    def together() -> bool:
        order = leader.order(invocation, "eager", None)
        assert order is not None
        for graphs in (leader, follower):
            graphs.obey(invocation, Ordered(order, lambda refusal: refusal, is_own=graphs is leader))
        return follower.has_replayed

    for _ in range(UNTIL_REPLAYED):
        together()
    for _ in range(UNTIL_REPLAYED):
        follower.run(Invocation(module, "forward", (torch.ones(2, 2),), fixed=()))
    assert follower.make_room()
    assert together()
    leader.make_room()
    together()
    assert follower._recordings == {}


@torch.no_grad()
def test_what_ranks_lost_by_a_leak_that_rank_0_only_heard_of_is_not_replayed() -> None:
    usual, leaking = nn.Linear(2, 2), nn.Linear(2, 2)
    names: dict[nn.Module, str] = {usual: "transformer", leaking: "unet"}
    recorders = FakeRecorder(), FakeRecorder()
    leader, follower = (Graphs(CPU, GraphPolicy(1000), recorder, names) for recorder in recorders)

    def run(module: nn.Module, ranks: str) -> None:
        """On the follower, and on rank 0 if that is among the ranks."""
        invocation = Invocation(module, "forward", (torch.ones(1, 2),), fixed=())
        order = leader.order(invocation, "eager", None, ranks)
        assert order is not None
        follower.obey(invocation, Ordered(order, lambda refusal: refusal, is_own=False))
        if "0" in ranks:
            leader.obey(invocation, Ordered(order, lambda refusal: refusal, is_own=True))
        else:
            leader.heard(order, module, "forward", follower.obeyed)

    for _ in range(UNTIL_REPLAYED + 1):
        run(usual, "0123")
        run(usual, "23")
    assert follower.num_replays == 2
    recorders[1].problem = Leaking("it keeps what others write to")
    for _ in range(CAPTURES_AFTER):
        run(leaking, "23")
    assert follower._recordings == {}
    run(usual, "0123")
    run(usual, "23")
    assert follower.num_replays == 2


@pytest.mark.parametrize(
    ("problem", "refusal"),
    [
        (Unfit("a"), Refusal("a")),
        (Slow("a"), Refusal()),
        (Full("a"), Refusal("a", is_passing=True)),
        (CaptureFailed("a"), Refusal("a", may_upload=True)),
        (Broken("a"), Refusal("a", may_upload=True)),
        (Leaking("a"), Refusal("a", is_leaking=True)),
    ],
)
def test_problems_tell_what_comes_next(problem: Unfit, refusal: Refusal) -> None:
    assert refusal_of(problem) == refusal


def test_a_leak_on_one_rank_is_what_all_act_on() -> None:
    said = [None, Refusal("a", may_upload=True), Refusal("b", is_leaking=True)]
    assert strongest(said) == said[2]
    assert strongest(said[:2]) == said[1]
    assert strongest([None, None]) is None


class Chain(nn.Module):
    """Enough kernels that a graph pays, with what ranks send one another in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = x + layer(x).relu()
            if index % 5 == 0:
                dist.all_reduce(x)
        return x


def rank_with_gpu(seat: Seat, told: Connection) -> None:
    """Rank 0 tells how many calls were replayed, and whether all were right."""
    device = torch.device("cuda", seat.index)
    torch.cuda.set_device(device)
    torch.manual_seed(0)
    module = Chain().to(device)
    own = model(module, device)
    if seat.index:
        follow(seat, own, config())
        return
    graphs = graphs_on(device, 2**30, own.pipeline.components)
    eager, replayed = Runtime(), Runtime(graphs=graphs)
    eager.ranks = replayed.ranks = lead(seat, own, config(), lambda _name, _note: None)
    is_right = []
    with torch.no_grad():
        for _ in range(UNTIL_REPLAYED + 3):
            call = Invocation(module, "forward", (torch.randn(3, 64, device=device),), fixed=())
            is_right.append(torch.equal(replayed.run(call), eager.run(call)))
    assert graphs is not None
    told.send_bytes(json.dumps([graphs.num_replays, all(is_right)]).encode())


def silent(seat: Seat, told: Connection) -> None:
    told.send_bytes(b"null")
    rank_with_gpu(seat, told)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two GPUs")
def test_on_gpus_what_ranks_send_one_another_is_in_their_graphs(tmp_path: Path) -> None:
    with telling(tmp_path / "meeting", rank_with_gpu, silent) as (heard, _):
        assert heard == [3, True]
