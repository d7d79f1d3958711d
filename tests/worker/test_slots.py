"""Slots of adapters in one component."""

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models.teams import each, teams
from torch import nn

from sgld.ipc.seats import Seat
from sgld.models.lora import LoraLayer
from sgld.models.tensor_layers import Cut, Parted, SplitLinear, SummedLinear, divide
from sgld.worker.adapted_layer import Unmixable
from sgld.worker.leader import Leader
from sgld.worker.slots import Applied, Slots, selected

CPU = torch.device("cpu")
MODULES: dict[str, tuple[Any, torch.Tensor]] = {
    "linear": (lambda: nn.Linear(6, 5), torch.randn(3, 6)),
    "linear of tokens": (lambda: nn.Linear(6, 5), torch.randn(3, 2, 4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), torch.randn(3, 4, 6)),
    "1d": (lambda: nn.Conv1d(6, 5, 3, padding=1), torch.randn(3, 6, 7)),
    "2d": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), torch.randn(3, 6, 8, 8)),
    "2d, same": (lambda: nn.Conv2d(6, 5, 3, padding="same", dilation=2), torch.randn(3, 6, 8, 8)),
    "3d": (lambda: nn.Conv3d(6, 5, (1, 2, 2), stride=(1, 2, 2)), torch.randn(3, 6, 2, 4, 4)),
}


def layer(module: Any, rank: int, *, has_bias: bool = False) -> LoraLayer:
    num_in = module.weight.flatten(1).shape[1]
    return LoraLayer(torch.randn(rank, num_in), torch.randn(5, rank), torch.randn(5) if has_bias else None)


def merged(module: Any, *changes: tuple[LoraLayer, float]) -> Any:
    """A copy with the changes in its weights."""
    copy = deepcopy(module)
    for change, scale in changes:
        copy.weight.data += scale * (change.up @ change.down).reshape(copy.weight.shape)
        if change.bias is not None:
            copy.bias.data += scale * change.bias
    return copy


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_each_row_has_the_adapters_of_its_request(name: str) -> None:
    torch.manual_seed(0)
    module, x = MODULES[name][0](), MODULES[name][1]
    has_bias = module.bias is not None
    first, second = layer(module, 3, has_bias=has_bias), layer(module, 20)
    component = nn.ModuleDict({"layer": module})
    expected = [
        merged(module, (first, 0.5), (second, 2.0))(x[:1]),
        module(x[1:2]),
        merged(module, (second, -1.0))(x[2:]),
    ]
    slots = Slots(component, CPU)
    slots.put("both", {"layer": [(first, 0.5), (second, 2.0)]})
    slots.put("one", {"layer": [(second, -1.0)]})

    with selected([(Applied(slots, "both"), 1), (None, 1), (Applied(slots, "one"), 1)]):
        together = module(x)
    with selected([(Applied(slots, "both"), 1)]):
        alone = module(x[:1])

    torch.testing.assert_close(together, torch.cat(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone, expected[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(module(x[1:2]), expected[1]), "nothing is selected between forwards"


@torch.no_grad()
def test_compiled_code_stays_the_same_whatever_slots_are_selected() -> None:
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> Any:
            return self.last(self.first(x).relu()).relu()

    component = Block()
    slots, x = Slots(component, CPU), torch.randn(2, 6)
    for key in "abc":
        slots.put(key, {"last": [(layer(component.last, 3), 1.0)]})
    compiled = torch.compile(component, backend=backend)
    results, num_graphs = [], []
    for key in "abc":
        with selected([(Applied(slots, key), 2)]):
            results.append((compiled(x), component(x)))
        num_graphs.append(len(graphs))

    for result, expected in results:
        torch.testing.assert_close(result, expected)
    assert num_graphs[0] == num_graphs[-1] > 0


@torch.no_grad()
def test_other_slots_do_not_change_a_bit_of_a_single_forward() -> None:
    component = nn.ModuleDict({"layer": nn.Linear(6, 5)})
    module, x = component["layer"], torch.randn(2, 7, 6)
    slots = Slots(component, CPU)
    slots.put("a", {"layer": [(layer(module, 4), 1.0)]})
    with selected([(Applied(slots, "a"), 1)]):
        before = module(x)
    slots.put("b", {"layer": [(layer(module, 40), 1.0)]})
    with selected([(Applied(slots, "a"), 1)]):
        assert torch.equal(module(x), before)


@torch.no_grad()
def test_what_has_no_row_for_each_request_is_not_mixed() -> None:
    component = nn.ModuleDict({"layer": nn.Linear(6, 5), "other": nn.Linear(6, 5)})
    slots = Slots(component, CPU)
    slots.put("a", {"layer": [(layer(component["layer"], 4), 1.0)]})
    slots.put("b", {"other": [(layer(component["other"], 4), 1.0)]})
    tokens = torch.randn(9, 6)
    with selected([(Applied(slots, "a"), 1), (Applied(slots, "a"), 2)]):
        component["layer"](tokens)
    with selected([(Applied(slots, "a"), 1), (None, 2)]):
        component["other"](tokens)
        with pytest.raises(Unmixable, match=r"\(9, 6\), not 3 rows"):
            component["layer"](tokens)


def test_buffers_stay_where_they_are_unless_they_are_too_small() -> None:
    component = nn.ModuleDict({"layer": nn.Linear(6, 5)})
    module, slots = component["layer"], Slots(component, CPU)
    versions = []
    for key, rank in (("a", 4), ("b", 8), ("c", 5), ("d", 5), ("e", 20)):
        slots.put(key, {"layer": [(layer(module, rank), 1.0)]})
        versions.append(slots.version)
    # c has room in what was taken for b; d doubles the slots, and e has a larger rank.
    assert versions[0] < versions[1] == versions[2] < versions[3] < versions[4]
    captured = slots.capture_key([(Applied(slots, "b"), 1)])
    slots.remove("b")
    slots.put("f", {"layer": [(layer(module, 3), 1.0)]})
    assert slots.version == versions[4]
    slots.remove("f")
    slots.put("b", {"layer": [(layer(module, 7), 1.0)]})
    assert slots.capture_key([(Applied(slots, "b"), 1)]) != captured
    slots.put("f", {"layer": [(layer(module, 3), 1.0)]})
    assert slots.capture_key([(Applied(slots, "a"), 1)]) != slots.capture_key([(Applied(slots, "f"), 1)])
    assert slots.capture_key([(None, 1)]) == ()


@torch.no_grad()
def test_adapters_are_in_what_their_layer_computes_in() -> None:
    component = nn.ModuleDict({"layer": nn.Linear(6, 5), "kept": nn.Linear(6, 5)})
    component["layer"].to(torch.bfloat16)
    change, slots = layer(component["kept"], 4), Slots(component, CPU)
    kept = merged(component["kept"], (change, 1.0))
    slots.put("a", {name: [(change, 1.0)] for name in component})
    x = torch.randn(2, 6)
    with selected([(Applied(slots, "a"), 1), (None, 1)]):
        assert component["layer"](x.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(component["kept"](x)[:1], kept(x)[:1])


@torch.no_grad()
@pytest.mark.parametrize("by_row", [True, False])
def test_layers_inside_of_autocast_have_adapters(by_row: bool) -> None:
    component = nn.ModuleDict({"layer": nn.Linear(6, 5)})
    change, slots = layer(component["layer"], 4), Slots(component, CPU)
    expected = merged(component["layer"], (change, 1.0))
    slots.put("a", {"layer": [(change, 1.0)]})
    x = torch.randn(2, 3, 6)
    with torch.autocast("cpu", torch.bfloat16), selected([(Applied(slots, "a"), 2)], by_row=by_row):
        result = component["layer"](x)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected(x), rtol=0.05, atol=0.2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@torch.no_grad()
def test_a_captured_forward_follows_the_slots_of_its_rows() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda")
    component = nn.ModuleDict({"layer": nn.Linear(16, 5)}).to(device)
    module, x = component["layer"], torch.randn(3, 7, 16, device=device)
    slots = Slots(component, device)
    for key in "abc":
        slots.put(key, {"layer": [(LoraLayer(torch.randn(4, 16), torch.randn(5, 4)), 1.0)]})

    def rows(keys: str) -> list[tuple[Applied | None, int]]:
        return [(Applied(slots, key), 1) for key in keys]

    def eager(keys: str) -> torch.Tensor:
        with selected(rows(keys), by_row=True):
            return module(x)  # type: ignore[no-any-return]

    expected = {keys: eager(keys) for keys in ("abc", "cab")}
    graph = torch.cuda.CUDAGraph()
    with selected(rows("abc"), by_row=True), torch.cuda.graph(graph):
        captured = module(x)
    assert slots.capture_key(rows("abc")) == slots.capture_key(rows("cab"))
    for keys in ("abc", "cab"):
        with selected(rows(keys), by_row=True):
            graph.replay()
        torch.testing.assert_close(captured, expected[keys])


@torch.no_grad()
def test_a_layer_that_was_removed_adds_nothing_wherever_it_comes_back() -> None:
    """As where a snapshot of a component is restored that was taken before."""
    component = nn.ModuleDict({"layer": nn.Linear(6, 5)})
    module: Any = component["layer"]
    x, slots = torch.randn(2, 6), Slots(component, CPU)
    slots.put("a", {"layer": [(layer(module, 4), 1.0)]})
    back = module.forward
    slots.remove("a")
    module.forward = back
    change = layer(module, 4)
    expected = nn.functional.linear(x, module.weight + change.up @ change.down, module.bias)
    slots.put("b", {"layer": [(change, 1.0)]})
    with selected([(Applied(slots, "b"), 2)]):
        torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(("kind", "dim"), [(SplitLinear, 0), (SummedLinear, 1)])
@torch.no_grad()
def test_parts_of_a_layer_have_their_parts_of_adapters(kind: type[Parted], dim: int, by_row: bool) -> None:
    torch.manual_seed(0)
    whole = nn.Linear(6, 5)
    change = layer(whole, 3, has_bias=True)
    x = torch.randn(2, 4, 6)
    calls = []
    for team in teams(2):
        part: Any = nn.Linear(6, 5)
        cuts = {"weight": Cut(dim, (whole.weight.shape[dim],))} | ({"bias": Cut(0, (5,))} if dim == 0 else {})
        divide(part, kind, cuts, team)
        for name, weight in whole.named_parameters():
            own = cuts[name].part(weight, team.index, 2) if name in cuts else weight
            part.register_parameter(name, nn.Parameter(own.detach()))
        slots = Slots(nn.ModuleDict({"layer": part}), CPU)
        slots.put("one", {"layer": [(change, 0.5)]})

        def call(part: Any = part, slots: Slots = slots) -> torch.Tensor:
            with slots.selected([("one", 2)], by_row=by_row):
                return part(x if dim == 0 else x[..., part.place])  # type: ignore[no-any-return]

        calls.append(call)
    found = each(calls)
    expected = merged(whole, (change, 0.5))(x)
    for one in [torch.cat(found, dim=-1)] if dim == 0 else found:
        torch.testing.assert_close(one, expected)


def test_there_are_no_more_slots_than_are_used() -> None:
    component = nn.ModuleDict({"layer": nn.Linear(6, 5)})
    slots = Slots(component, CPU, max_slots=5)
    for key in "abcd":
        slots.put(key, {"layer": [(layer(component["layer"], 8), 1.0)]})
    assert slots.size_bytes == 5 * 8 * (6 + 5) * 4


@torch.no_grad()
def test_slots_of_rows_stay_where_they_are_and_are_written_for_forwards_here_only() -> None:
    """Graphs read them there, and a forward may go on here while others are sent elsewhere."""
    component, elsewhere = nn.ModuleDict({"layer": nn.Linear(6, 5)}), [False]
    slots = Slots(component, CPU)
    slots.follow(lambda key, changes: None, lambda key: None, lambda: elsewhere[0])
    slots.put("a", {"layer": [(layer(component["layer"], 2), 1.0)]})

    def index(*keys: str) -> tuple[Any, bool]:
        with slots.selected([(key, 1) for key in keys]):
            assert slots.selection is not None
            return slots.selection.index, slots.selection.is_by_row

    (two, _), version = index("a", ""), slots.version
    index(*["a", ""] * 50)
    elsewhere[0] = True
    assert index("", "a") == (None, True)
    assert two.tolist() == [1, 0]
    elsewhere[0] = False
    assert index("", "a")[0] is two
    assert (two.tolist(), slots.version) == ([0, 1], version)


def test_slots_change_after_forwards_on_other_streams() -> None:
    module, sizes = nn.Linear(6, 5), list[int]()
    slots = Slots(nn.ModuleDict({"layer": module}), CPU)
    slots.follow(lambda key, changes: None, lambda key: None, join=lambda: sizes.append(slots.size_bytes))
    slots.put("a", {"layer": [(layer(module, 3), 1.0)]})
    size = slots.size_bytes
    slots.remove("a")
    assert sizes == [0, size]
    assert slots.size_bytes == 0


class Seen(Slots):
    """Is followed by a leader."""

    joined: Any = None

    def follow(self, *told: Any) -> None:
        [*_, self.joined] = told


def test_leader_has_lanes_joined_before_slots_change() -> None:
    member: Any = SimpleNamespace(seat=Seat(0, 1), names={}, components={"transformer": nn.Linear(6, 5)})
    leader, slots = Leader(member, lambda name, note: None), Seen(nn.Linear(6, 5), CPU)
    leader.follow_adapters({"transformer": slots})
    num_joins: list[None] = []
    leader.join = lambda: num_joins.append(None)
    slots.joined()
    assert len(num_joins) == 1
