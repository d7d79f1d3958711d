"""Calls while another process compiles for them. It is a fake here; tests/worker/test_aside.py has the real one."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sgld.models.lora import LoraLayer
from sgld.worker.aside import CompilerProcess
from sgld.worker.builder import LOOK_S
from sgld.worker.compiler import CompileJob, CompileResult
from sgld.worker.imports import COMPILER, Imports
from sgld.worker.invocation import Invocation
from sgld.worker.runtime import Runtime
from sgld.worker.slots import Slots
from sgld.worker.swap import Swap
from worker.layered import Denoiser


class FakeProcess(CompilerProcess):
    """Done when it is said so."""

    def __init__(self, jobs: Sequence[CompileJob]) -> None:
        self.jobs, self.is_closed = jobs, False
        self.said: CompileResult | None = None

    def result(self) -> CompileResult | None:
        return self.said

    def close(self) -> None:
        self.is_closed = True


class FakeImports(Imports):
    """Done when it is said so."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.said = names, True

    @property
    def is_done(self) -> bool:
        return self.said

    def close(self) -> None:
        pass


class Bench:
    """A component in a runtime with compilers that compile nothing."""

    def __init__(self, **options: Any) -> None:
        self.module = Denoiser()
        self.processes: list[FakeProcess] = []
        self.notes: list[str] = []
        self.changed: list[nn.Module] = []
        self.num_graphs = 0
        self.runtime = Runtime()
        self.runtime.swap = Swap(
            {self.module: "transformer"},
            note=lambda _, note: self.notes.append(note),
            changed=self.changed.append,
            compiling=self._compiling,
            compiles=self._compile,
            start=self._start,
            imports=self._import,
            **options,
        )
        self.imports: list[FakeImports] = []
        self.num_compiling = 0
        self.is_running = False

    def _start(self, jobs: Sequence[CompileJob]) -> FakeProcess:
        self.processes.append(FakeProcess(jobs))
        return self.processes[-1]

    def _import(self, names: Sequence[str]) -> FakeImports:
        self.imports.append(FakeImports(names))
        return self.imports[-1]

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        self.num_compiling += 1
        yield

    def _compile(self, module: nn.Module) -> None:
        module.compile(backend=self, dynamic=True)

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        self.num_graphs += 1
        return graph.forward

    def run(self, rows: int, *, is_exact: bool = False) -> str:
        """One call, which gives what it should; how it ran."""
        x = torch.randn(rows, 8)
        expected = x
        for layer in self.module.layers:
            expected = layer.forward(expected)
        self.runtime.look()
        self.is_running = True
        assert torch.equal(self.runtime.run(Invocation(self.module, "forward", (x,), is_exact=is_exact)), expected)
        self.is_running = False
        return self.runtime.variant

    def until_compiled(self, rows: int) -> None:
        """The process is done; calls until one runs compiled."""
        self.processes[-1].said = CompileResult()
        assert any(self.run(rows) == "compiled" for _ in range(9))


@pytest.fixture(autouse=True)
def _inert(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # What is read of a cache that holds nothing would be compiled.
    monkeypatch.setattr("sgld.worker.builder.run_job", lambda job: None)
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def test_calls_go_on_as_they_were_until_the_process_is_done() -> None:
    bench = Bench()
    assert [bench.run(2) for _ in range(3)] == ["eager"] * 3
    assert (len(bench.processes), bench.num_graphs, bench.notes) == (1, 0, [])
    bench.until_compiled(2)
    assert bench.run(3) == "compiled"
    assert (bench.num_graphs, len(bench.processes), bench.notes) == (1, 1, ["compiled"])
    assert bench.changed == [bench.module]
    assert bench.processes[0].is_closed


@pytest.mark.parametrize("has_adapters", [True, False])
def test_what_is_refused_because_of_adapters_is_tried_again_when_they_are_gone(has_adapters: bool) -> None:
    bench = Bench()
    slots = Slots(bench.module, torch.device("cpu"))
    name, layer = next((n, part) for n, part in bench.module.named_modules() if isinstance(part, nn.Linear))
    if has_adapters:
        width = layer.in_features
        slots.put("a", {name: [(LoraLayer(torch.zeros(2, width), torch.zeros(width, 2)), 1.0)]})
    assert bench.runtime.swap is not None
    bench.runtime.swap.refuse(Invocation(bench.module, "forward", (torch.randn(2, 8),)), "it can't be traced")
    assert [bench.run(2) for _ in range(3)] == ["eager"] * 3
    assert bench.processes == []
    if has_adapters:
        slots.remove("a")
    bench.run(2)
    assert len(bench.processes) == has_adapters


def test_layers_that_are_alike_are_one_job() -> None:
    bench = Bench()
    bench.run(2)
    assert len(bench.processes[0].jobs) == 1


def test_call_for_which_there_is_no_code_goes_to_the_process_in_turn() -> None:
    bench = Bench()
    bench.run(2)
    bench.until_compiled(2)
    # One row is another form; it doesn't compile in the call.
    assert [bench.run(1), bench.run(1)] == ["eager"] * 2
    assert (bench.num_graphs, len(bench.processes)) == (1, 2)
    assert bench.run(2) == "compiled"
    bench.until_compiled(1)
    assert bench.num_graphs == 2
    assert [bench.run(rows) for rows in (1, 2, 3)] == ["compiled"] * 3


def test_forms_that_come_meanwhile_are_compiled_together() -> None:
    bench = Bench()
    for rows in (1, 2, 3, 2):
        bench.run(rows)
    assert [len(process.jobs) for process in bench.processes] == [1]
    bench.processes[0].said = CompileResult()
    bench.run(1)
    assert [len(process.jobs) for process in bench.processes] == [1, 2]


def test_exact_calls_never_run_that_code_and_ask_for_none() -> None:
    bench = Bench()
    assert bench.run(2, is_exact=True) == "eager"
    assert bench.processes == []
    bench.run(2)
    bench.until_compiled(2)
    num_graphs = bench.num_graphs
    assert bench.run(2, is_exact=True) == bench.run(1, is_exact=True) == "eager"
    assert bench.num_graphs == num_graphs


def test_process_that_fails_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.run(2)
    bench.processes[0].said = CompileResult(problem="InductorError: no C++ compiler")
    assert [bench.run(2), bench.run(2)] == ["eager"] * 2
    assert len(caplog.messages) == 1
    assert "no C++ compiler" in bench.notes[0]
    assert len(bench.processes) == 1


def test_after_a_failure_no_other_size_starts_a_process_again() -> None:
    bench = Bench()
    bench.run(2)
    bench.processes[0].said = CompileResult(problem="no C++ compiler")
    assert [bench.run(rows) for rows in (2, 3, 4)] == ["eager"] * 3
    assert len(bench.processes) == len(bench.notes) == 1


def test_where_it_was_asked_for_calls_compile_themselves_then() -> None:
    told: list[nn.Module] = []
    bench = Bench(inline=told.append)
    bench.run(2)
    bench.processes[0].said = CompileResult(problem="it is killed")
    bench.run(2)
    assert told == [bench.module]
    assert "compiled by its calls" in bench.notes[0]


def test_layer_that_another_process_cannot_make_stays_as_it_is() -> None:
    bench = Bench()
    bench.module.layers[0].register_forward_hook(lambda *_: None)
    assert [bench.run(2), bench.run(2)] == ["eager"] * 2
    assert bench.processes == []
    assert len(bench.notes) == 1


def test_what_was_compiled_before_an_earlier_start_needs_no_process(tmp_path: Path) -> None:
    first = Bench(cache=tmp_path)
    first.run(2)
    first.until_compiled(2)
    second = Bench(cache=tmp_path)
    assert any(second.run(2) == "compiled" for _ in range(9))
    assert second.processes == []


def test_what_is_in_the_cache_waits_for_no_process(tmp_path: Path) -> None:
    first, second = Bench(cache=tmp_path), Bench(cache=tmp_path)
    first.run(2)
    first.until_compiled(2)
    assert second.run(1) == "eager"
    assert any(second.run(2) == "compiled" for _ in range(9))
    assert second.processes[0].said is None
    second.runtime.close()


def test_one_process_on_a_machine_compiles_what_several_ranks_need(tmp_path: Path) -> None:
    times = [0.0]
    first, second = Bench(cache=tmp_path), Bench(cache=tmp_path, clock=lambda: times[-1])
    first.run(2)
    assert [second.run(2) for _ in range(3)] == ["eager"] * 3
    assert (len(first.processes), len(second.processes)) == (1, 0)
    first.until_compiled(2)
    times.append(LOOK_S)
    assert any(second.run(2) == "compiled" for _ in range(9))
    assert second.processes == []


def test_other_layers_are_compiled_at_the_same_time(tmp_path: Path) -> None:
    first, second = Bench(cache=tmp_path), Bench(cache=tmp_path)
    for layer in second.module.layers:
        layer.register_buffer("other", torch.ones(1))
    first.run(2)
    second.run(2)
    assert (len(first.processes), len(second.processes)) == (1, 1)
    first.until_compiled(2)
    second.until_compiled(2)


def test_who_compiled_for_all_and_is_gone_has_a_successor(tmp_path: Path) -> None:
    first, second = Bench(cache=tmp_path), Bench(cache=tmp_path, clock=iter(range(99)).__next__)
    first.run(2)
    second.run(2)
    first.runtime.close()
    second.run(2)
    assert len(second.processes) == 1
    second.until_compiled(2)


def test_it_is_told_whether_code_is_on_its_way() -> None:
    told: list[bool] = []
    bench = Bench(pending=told.append)
    bench.run(2)
    assert told == [True]
    bench.until_compiled(2)
    assert told == [True, False]


def test_code_is_read_in_parts_between_calls() -> None:
    bench = Bench()
    bench.run(2)
    bench.processes[0].said = CompileResult()
    before = bench.num_compiling
    assert [bench.run(2) for _ in range(2)] == ["eager"] * 2
    assert bench.num_compiling == before + 1
    assert bench.run(2) == "compiled"


def test_nothing_is_read_before_what_that_takes_is_imported() -> None:
    bench = Bench()
    bench.run(2)
    assert [imports.names for imports in bench.imports] == [COMPILER]
    bench.processes[0].said = CompileResult(imported=("a", "b"))
    bench.run(2)
    bench.imports[0].said = False
    assert [bench.run(2) for _ in range(4)] == ["eager"] * 4
    bench.imports[0].said = True
    bench.run(2)
    assert [imports.names for imports in bench.imports] == [COMPILER, ("a", "b")]
    assert any(bench.run(2) == "compiled" for _ in range(3))


def test_between_two_readings_calls_have_their_turn() -> None:
    times = [0.0]
    bench = Bench(clock=lambda: times[-1])
    # Two kinds of layers.
    bench.module.layers[0].inner = nn.Linear(8, 8, bias=False)

    def read(_job: CompileJob) -> None:
        times.append(times[-1] + 1.0)

    num_read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sgld.worker.builder.run_job", read)
        bench.run(2)
        bench.processes[0].said = CompileResult()
        for _ in range(20):
            times.append(times[-1] + 0.25)
            num_read.append(sum(b - a == 1.0 for a, b in itertools.pairwise(times)))
            bench.run(2)
    begins = [num_read.index(num) for num in (1, 2)]
    assert begins[1] - begins[0] >= 8
    assert bench.run(2) == "compiled"


def test_what_is_known_is_read_before_calls_ask_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[CompileJob] = []
    monkeypatch.setattr("sgld.worker.builder.run_job", read.append)
    first = Bench(cache=tmp_path)
    first.run(2)
    (job,) = first.processes[0].jobs
    first.processes[0].said = CompileResult(imported=("torch",))
    first.run(2)
    read.clear()
    second, other = Bench(cache=tmp_path), Bench(cache=tmp_path)
    for layer in other.module.layers:
        layer.inner = nn.Linear(8, 8, bias=False)
    for bench in (second, other):
        assert bench.runtime.swap is not None
        bench.runtime.swap.expect()
        while bench.runtime.is_code_pending:
            bench.runtime.look()
    assert read == [job]
    assert [imports.names for imports in second.imports] == [["torch"]]
    # The call that comes reads nothing.
    second.run(2)
    assert second.run(2) == "eager"
    assert second.run(2) == "compiled"
    assert read == [job]


def test_process_starts_when_computing_has_taken_long_enough() -> None:
    times = [0.0]
    bench = Bench(after_s=2.0, clock=lambda: times[-1])
    num_processes = []
    for time_s in (0.5, 1.0, 100.0, 100.5):
        times.append(time_s)
        bench.run(2)
        num_processes.append(len(bench.processes))
    # What a pause takes isn't computing.
    assert num_processes == [0, 0, 1, 1]


def test_closing_ends_the_process() -> None:
    bench = Bench()
    bench.run(2)
    bench.runtime.close()
    assert bench.processes[0].is_closed


def test_other_errors_of_a_model_are_its_own() -> None:
    bench = Bench()
    bench.run(2)
    bench.until_compiled(2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        bench.runtime.run(Invocation(bench.module, "forward", (torch.ones(2, 9),)))


@pytest.mark.parametrize("is_read", [False, True], ids=["in the process", "while it is read"])
def test_what_was_begun_for_a_component_is_dropped_where_its_calls_compile_it(is_read: bool) -> None:
    told: list[nn.Module] = []
    bench = Bench(inline=told.append)
    bench.run(2)
    process = bench.processes[0]
    if is_read:
        process.said = CompileResult()
        bench.run(2)
    # Another form can't be made elsewhere.
    bench.module.layers[0].register_forward_hook(lambda *_: None)
    bench.run(3)
    assert told == [bench.module]
    process.said = CompileResult(problem="killed")
    assert [bench.run(2) for _ in range(5)] == ["eager"] * 5
    assert bench.changed == []


def test_nothing_is_taken_over_while_a_task_changes_components() -> None:
    bench = Bench()
    bench.run(2)
    bench.processes[0].said = CompileResult()
    bench.runtime.are_changed = True
    assert [bench.run(2) for _ in range(9)] == ["eager"] * 9
    bench.runtime.are_changed = False
    bench.until_compiled(2)
    # Nor does what is changed run it, or ask for its own.
    bench.runtime.are_changed = True
    assert [bench.run(2), bench.run(1)] == ["eager"] * 2
    assert len(bench.processes) == 1


def test_process_gives_way_where_memory_is_short_and_comes_back_after_as_much_computing() -> None:
    times, failures = [0.0], [torch.OutOfMemoryError("too large")]
    bench = Bench(after_s=1.0, clock=lambda: times[-1])

    def run() -> str:
        times.append(times[-1] + 0.6)
        return bench.run(2)

    assert [run(), run(), len(bench.processes)] == ["eager", "eager", 1]
    block: Any = bench.module.layers[0]
    inner, own = block.inner, nn.Linear.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if failures and bench.is_running:
            raise failures.pop()
        return own(inner, x)

    inner.forward = forward
    assert run() == "eager"
    assert bench.processes[0].is_closed
    assert not failures
    del inner.forward
    assert len(bench.processes) == 1
    run()
    run()
    assert len(bench.processes) == 2
