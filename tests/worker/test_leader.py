"""What rank 0 tells the others."""

import threading
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import nn

from sgld.errors import PipelineFailed
from sgld.ipc.seats import Seat
from sgld.parallel import Ranks
from sgld.worker.axes import Batched
from sgld.worker.distributed import _obey
from sgld.worker.elastic import ElasticLeader, serve
from sgld.worker.graph_orders import Ordered, Refusal
from sgld.worker.graph_policy import CAPTURES_AFTER, Decision, GraphPolicy
from sgld.worker.graphs import Graphs
from sgld.worker.invocation import Invocation
from sgld.worker.leader import Leader
from sgld.worker.member import performed
from sgld.worker.orders import FollowerFailed, Invoke, receive, send
from sgld.worker.recorder import Leaking, Unfit
from sgld.worker.rows import RowAxes
from sgld.worker.runtime import Runtime
from worker.recordings import FakeRecorder, FakeRecording

CPU = torch.device("cpu")


class FakeMember:
    """Rank 0 of ranks that only listen."""

    def __init__(self, module: nn.Module, seat: Seat) -> None:
        self.seat, self.device, self.names = seat, CPU, {module: "transformer"}
        self.slots: dict[str, Any] = {}
        self.components, self.num_groups, self.num_meetings = {"transformer": module}, 1, 0
        self.num_met = 0
        """In each forward."""
        self.is_tiled: Callable[[str], bool] = lambda name: False
        self.has_parts = self.is_tiled

    def group_of(self, invoke: Invoke) -> None:
        return None

    def perform(self, invoke: Invoke, tree: Any, runtime: Runtime) -> Any:
        [module] = self.names
        args, kwargs = tree
        self.num_meetings += self.num_met
        agree: Callable[[Refusal | None], Refusal | None] = lambda refusal: refusal  # noqa: E731
        ordered = Ordered(invoke.graph, agree, is_own=not self.seat.index) if invoke.graph is not None else None
        is_shared = ordered is not None
        return runtime.run_here(
            Invocation(module, "forward", args, kwargs, fixed=invoke.fixed, is_shared=is_shared, ordered=ordered)
        )


@torch.no_grad()
def test_ranks_hear_of_graphs_that_they_have_and_of_no_others() -> None:
    module = nn.Linear(2, 2)
    pairs = [Pipe() for _ in range(3)]
    member: Any = FakeMember(module, Seat(0, 4, "", tuple(own for own, _ in pairs)))
    leader = ElasticLeader(member, lambda name, note: None)
    graphs = Graphs(CPU, GraphPolicy(10_000), FakeRecorder(), {module: "transformer"})
    runtime = Runtime(graphs=graphs)
    runtime.ranks = leader

    def gone(ranks: Ranks) -> int:
        """How many graphs ranks are told to be gone, with one forward."""
        with leader.on(ranks):
            runtime.run(Invocation(module, "forward", (torch.ones(1, 2),), fixed=()))
        told = [receive(pairs[rank - 1][1]) for rank in ranks.every if rank]
        assert all(order.ranks == ranks for order in told)
        [num] = {len(order.graph.gone) for order in told}
        return num

    for _ in range(CAPTURES_AFTER):
        assert gone(Ranks(0, 4)) == 0
    assert graphs.make_room()
    assert (gone(Ranks(0, 2)), gone(Ranks(0, 4)), gone(Ranks(0, 4))) == (0, 1, 0)


@torch.no_grad()
def test_graphs_that_one_rank_loses_by_a_call_of_its_own_no_rank_replays() -> None:
    module, (wire, its_wire) = nn.Linear(2, 2), Pipe()
    recorders = [FakeRecorder(), FakeRecorder()]
    here, there = (
        Runtime(graphs=Graphs(CPU, GraphPolicy(10_000), recorder, {module: "transformer"})) for recorder in recorders
    )
    leading: Any = FakeMember(module, Seat(0, 2, "", (wire,)))
    following: Any = FakeMember(module, Seat(1, 2, "", (its_wire,)))
    here.ranks = leader = ElasticLeader(leading, lambda name, note: None)

    def together() -> bool:
        with leader.on(Ranks(0, 2)):
            here.run(Invocation(module, "forward", (torch.ones(1, 2),), fixed=()))
        performed(following, receive(its_wire), None, there)
        replayed = {runtime.graphs is not None and runtime.graphs.has_replayed for runtime in (here, there)}
        assert len(replayed) == 1
        return replayed.pop()

    def alone() -> None:
        with leader.on(Ranks(1, 1)):
            away = here.run(Invocation(module, "forward", (torch.ones(3, 2),), fixed=()))
        serve(following, receive(its_wire), there)
        torch.testing.assert_close(away.result(), module(torch.ones(3, 2)))

    assert [together() for _ in range(CAPTURES_AFTER + 2)] == [False] * (CAPTURES_AFTER + 1) + [True]
    recorders[1].problem = Leaking("it keeps tensors")
    for _ in range(CAPTURES_AFTER):
        alone()
    recorders[1].problem = None
    again = [together() for _ in range(2 * CAPTURES_AFTER + 2)]
    assert again == [False] * (2 * CAPTURES_AFTER + 1) + [True]
    alone()
    assert together()


@torch.no_grad()
def test_ranks_that_share_forwards_without_rank_0_replay_graphs_of_which_it_keeps_account() -> None:
    module, pairs, recorders = nn.Linear(2, 2), [Pipe() for _ in range(3)], [FakeRecorder() for _ in range(3)]
    names: dict[nn.Module, str] = {module: "transformer"}
    ranks = Ranks(2, 2)
    here, *there = (Runtime(graphs=Graphs(CPU, GraphPolicy(10_000), recorder, names)) for recorder in recorders)
    leading: Any = FakeMember(module, Seat(0, 4, "", tuple(own for own, _ in pairs)))
    following: list[Any] = [FakeMember(module, Seat(rank, 4, "", (pairs[rank - 1][1],))) for rank in ranks.every]
    here.ranks = leader = ElasticLeader(leading, lambda name, note: None)

    def replays(rows: int = 1) -> bool:
        x = torch.ones(rows, 2)
        with leader.on(ranks):
            away = here.run(Invocation(module, "forward", (x,), fixed=()))
        for member, runtime in zip(following, there, strict=True):
            serve(member, receive(member.seat.wires[0]), runtime)
        torch.testing.assert_close(away.result(), module(x))
        [has_replayed] = {runtime.graphs is not None and runtime.graphs.has_replayed for runtime in there}
        return has_replayed

    def loses() -> None:
        """The first of them loses its graphs by calls of its own."""
        recorders[1].problem = Leaking("it keeps tensors")
        for _ in range(CAPTURES_AFTER):
            with leader.on(Ranks(2, 1)):
                away = here.run(Invocation(module, "forward", (torch.ones(5, 2),), fixed=()))
            serve(following[0], receive(following[0].seat.wires[0]), there[0])
            away.result()
        recorders[1].problem = None

    def num_trials() -> list[int]:
        return [runtime.graphs.num_trials for runtime in (here, *there) if runtime.graphs is not None]

    assert [replays() for _ in range(CAPTURES_AFTER + 2)] == [False] * (CAPTURES_AFTER + 1) + [True]
    loses()
    again = [replays() for _ in range(2 * CAPTURES_AFTER + 2)]
    assert again == [False] * (2 * CAPTURES_AFTER + 1) + [True]
    assert here.graphs is not None
    assert here.graphs.make_room() is False, "it has none itself"
    assert not replays(), "they hear that it has given up theirs"
    for recorder in recorders:
        recorder.problem = Unfit("this model can't")
    before = num_trials()
    assert not any(replays(rows=3) for _ in range(2 * CAPTURES_AFTER))
    assert num_trials() == [before[0], before[1] + 1, before[2] + 1]


@torch.no_grad()
def test_what_fails_without_rank_0_is_no_graph() -> None:
    module, pairs, ranks = nn.Linear(2, 2), [Pipe() for _ in range(3)], Ranks(2, 2)
    leading: Any = FakeMember(module, Seat(0, 4, "", tuple(own for own, _ in pairs)))
    runtime = Runtime(graphs=Graphs(CPU, GraphPolicy(10_000), FakeRecorder(), {module: "transformer"}))
    runtime.ranks = leader = ElasticLeader(leading, lambda name, note: None)
    for _ in range(2 * CAPTURES_AFTER):
        with leader.on(ranks):
            away = runtime.run(Invocation(module, "forward", (torch.ones(1, 2),), fixed=()))
        orders = [receive(pairs[rank - 1][1]) for rank in ranks.every]
        assert all(order.graph.decision is Decision.EAGER for order in orders)
        for rank, order in zip(ranks.every, orders, strict=True):
            send(pairs[rank - 1][1], FollowerFailed(order.seq, "no room"))
        with pytest.raises(PipelineFailed, match="no room"):
            away.result()


@torch.no_grad()
def test_rows_of_what_is_shared_by_tiles_are_not_parted() -> None:
    module, pair = nn.Linear(2, 2), Pipe()
    member: Any = FakeMember(module, Seat(0, 2, "", (pair[0],)))
    member.num_groups, member.is_tiled = 2, lambda name: True
    leader = Leader(member, lambda name, note: None)
    runtime = Runtime()
    runtime.ranks = leader
    axes = RowAxes({(0, 0): Batched(0, 1)}, {}, frozenset(), rows=3, unit=1)
    leader.run(Invocation(module, "decode", (torch.ones(3, 2),), axes=axes), runtime)
    assert receive(pair[1]).rows is None
    assert not pair[1].poll()


class Broken(nn.Module):
    """Its forward fails."""

    def forward(self, _x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no room")


class Ended(Exception):
    """In the place of the end of a process."""


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 raises where it would end."""

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr("sgld.worker.leader.os._exit", end)


@torch.no_grad()
@pytest.mark.parametrize(
    ("stays", "num_met", "num_groups", "goes_on"),
    [(True, 0, 1, True), (False, 0, 1, False), (True, 1, 1, False), (True, 1, 2, True)],
    ids=["alike", "left", "elsewhere", "of another group"],
)
def test_call_fails_alone_only_if_all_ranks_failed_at_one_place_and_are_there(
    stays: bool, num_met: int, num_groups: int, goes_on: bool, ending: None
) -> None:
    """A rank that fails alone leaves, and that makes the others fail, too: then there is nobody to go on with."""
    module, (wire, its_wire) = Broken(), Pipe()
    leading: Any = FakeMember(module, Seat(0, 2, "", (wire,)))
    following: Any = FakeMember(module, Seat(1, 2, "", (its_wire,)))
    # Of an earlier forward, of which it doesn't matter.
    following.num_meetings, following.num_met = 5, num_met
    leading.num_groups = num_groups
    runtime = Runtime()
    runtime.ranks = Leader(leading, lambda name, note: None)

    def follower() -> None:
        invoke = receive(its_wire)
        if stays:
            _obey(following, invoke, Runtime())
        else:
            send(its_wire, FollowerFailed(invoke.seq, "no room"))
            its_wire.close()

    thread = threading.Thread(target=follower)
    thread.start()
    with pytest.raises(RuntimeError if goes_on else Ended):
        runtime.run(Invocation(module, "forward", (torch.ones(1, 2),)))
    thread.join()


@torch.no_grad()
@pytest.mark.parametrize(("num_met", "is_over"), [(0, False), (1, True)], ids=["alike", "elsewhere"])
def test_ranks_that_fail_without_rank_0_at_two_places_do_not_go_on(num_met: int, is_over: bool, ending: None) -> None:
    module, pairs, ranks = Broken(), [Pipe() for _ in range(3)], Ranks(2, 2)
    leading: Any = FakeMember(module, Seat(0, 4, "", tuple(own for own, _ in pairs)))
    following: list[Any] = [FakeMember(module, Seat(rank, 4, "", (pairs[rank - 1][1],))) for rank in ranks.every]
    following[1].num_met = num_met
    runtime = Runtime()
    runtime.ranks = leader = ElasticLeader(leading, lambda name, note: None)

    with leader.on(ranks):
        away = runtime.run(Invocation(module, "forward", (torch.ones(1, 2),)))
    for member in following:
        serve(member, receive(member.seat.wires[0]), Runtime())
    with pytest.raises(Ended if is_over else PipelineFailed):
        away.result()


@torch.no_grad()
@pytest.mark.parametrize("num_failures", [1, 2])
@pytest.mark.parametrize("is_result", [False, True], ids=["arguments", "result"])
def test_what_is_on_its_way_is_received_or_nobody_goes_on(
    num_failures: int, is_result: bool, monkeypatch: pytest.MonkeyPatch, ending: None
) -> None:
    """Who has no room for it would take it for the next message."""
    module, (wire, its_wire) = nn.Linear(2, 2), Pipe()
    leading: Any = FakeMember(module, Seat(0, 2, "", (wire,)))
    following: Any = FakeMember(module, Seat(1, 2, "", (its_wire,)))
    runtime = Runtime()
    runtime.ranks = leader = ElasticLeader(leading, lambda name, note: None)
    left = [num_failures]

    def no_space(_parcel: object, _device: torch.device) -> None:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("no room")

    def fill() -> None:
        monkeypatch.setattr("sgld.worker.elastic.space_for", no_space)

    with leader.on(Ranks(1, 1)):
        away = runtime.run(Invocation(module, "forward", (torch.ones(1, 2),)))
    if not is_result:
        fill()
    if not is_result and num_failures > 1:
        with pytest.raises(SystemExit, match="no room for what rank 0 sends"):
            serve(following, receive(its_wire), Runtime())
        return
    serve(following, receive(its_wire), Runtime())
    fill()
    if num_failures > 1:
        with pytest.raises(Ended):
            away.result()
    else:
        torch.testing.assert_close(away.result(), module(torch.ones(1, 2)))


class Keeping(FakeRecorder):
    """Knows the graphs that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: WeakSet[FakeRecording] = WeakSet()

    def record(self, forward: Callable[[Any], Any], tree: Any, tensors: Sequence[torch.Tensor]) -> FakeRecording:
        recording = super().record(forward, tree, tensors)
        self.kept.add(recording)
        return recording


class Large(nn.Module):
    """There is no room for its forward beside a graph."""

    def __init__(self, recorder: Keeping) -> None:
        super().__init__()
        self.recorder = recorder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.recorder.kept:
            raise torch.OutOfMemoryError("no room")
        return 2 * x


@torch.no_grad()
def test_graphs_that_ranks_share_go_where_there_is_no_room_beside_them() -> None:
    """As those of one rank do: where a graph is compared, and for another size."""
    wire, its_wire = Pipe()
    recorders = [Keeping(), Keeping()]
    modules = [Large(recorder) for recorder in recorders]
    here, there = (
        Runtime(graphs=Graphs(CPU, GraphPolicy(10_000), recorder, {module: "transformer"}))
        for recorder, module in zip(recorders, modules, strict=True)
    )
    leading: Any = FakeMember(modules[0], Seat(0, 2, "", (wire,)))
    following: Any = FakeMember(modules[1], Seat(1, 2, "", (its_wire,)))
    here.ranks = Leader(leading, lambda name, note: None)
    is_over = threading.Event()

    def follow() -> None:
        while not is_over.is_set():
            if its_wire.poll(0.01):
                _obey(following, receive(its_wire), there)

    thread = threading.Thread(target=follow)
    thread.start()
    num_kept = []
    try:
        for num in (*[1] * (CAPTURES_AFTER + 1), *[2] * CAPTURES_AFTER, 3):
            x = torch.ones(num, 2)
            torch.testing.assert_close(here.run(Invocation(modules[0], "forward", (x,), fixed=())), 2 * x)
            num_kept.append(len(recorders[0].kept))
    finally:
        is_over.set()
        thread.join()
    assert num_kept == [*[0] * (CAPTURES_AFTER - 1), 1, 0, *[0] * (CAPTURES_AFTER - 1), 1, 0]
