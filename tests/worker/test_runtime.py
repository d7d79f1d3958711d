"""Running a component: with the room that it needs, and compiled as far as that works."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sgld.models import norms
from sgld.models.placement import compile_components, decompile
from sgld.worker.compilation import watched_compilations
from sgld.worker.executor import Executor
from sgld.worker.invocation import Invocation
from sgld.worker.residency import Residency, Weights
from sgld.worker.runtime import Runtime
from worker import layered
from worker.layered import Block
from worker.requests import call_of, values


class Denoiser(layered.Denoiser):
    """Compiles its layers as models of diffusers do."""

    def compile_repeated_blocks(self, **kwargs: Any) -> None:
        for layer in self.layers:
            layer.compile(**kwargs)


class Backend:
    """Compiles nothing; it fails for graphs with inputs of these widths, or for all."""

    def __init__(self, refuses: tuple[int, ...] | None = ()) -> None:
        self.refuses = refuses
        self.num_graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        shapes = {size for value in inputs if isinstance(value, torch.Tensor) for size in value.shape}
        if self.refuses is None or shapes & set(self.refuses):
            raise NotImplementedError("there is no compiler")
        self.num_graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture
def notes() -> list[tuple[str, str]]:
    return []


def runtime_of(module: nn.Module, notes: list[tuple[str, str]]) -> Runtime:
    return Runtime(None, {module: "transformer"}, lambda component, note: notes.append((component, note)))


def ran(runtime: Runtime, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return runtime.run(Invocation(module, "forward", (x,)))  # type: ignore[no-any-return]


def test_component_that_cannot_be_compiled_runs_eagerly_and_says_so_once(
    notes: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    module = Block()
    expected = module(torch.ones(2, 8))
    module.compile(backend=Backend(refuses=None))
    runtime = runtime_of(module, notes)
    with caplog.at_level(logging.WARNING, "sgld"):
        for _ in range(2):
            assert torch.equal(ran(runtime, module, torch.ones(2, 8)), expected)
    assert len(notes) == len(caplog.messages) == 1
    assert notes[0][0] == "transformer"
    assert "there is no compiler" in notes[0][1]
    assert module._compiled_call_impl is None


def test_blocks_that_cannot_be_compiled_run_eagerly_though_a_step_cache_watches_them(
    notes: list[tuple[str, str]],
) -> None:
    module = Denoiser()
    blocks = list(module.layers)
    expected = module(torch.ones(2, 8))
    module.compile_repeated_blocks(backend=Backend(refuses=None))
    runtime = runtime_of(module, notes)
    # They are behind others, as `Split.during` has it.
    module.layers = nn.ModuleList()
    module.forward = lambda x: blocks[1](blocks[0](x))  # type: ignore[method-assign]
    for _ in range(2):
        assert torch.equal(ran(runtime, module, torch.ones(2, 8)), expected)
    assert len(notes) == 1
    assert all(block._compiled_call_impl is None for block in blocks)


def test_form_that_cannot_be_compiled_runs_eagerly_and_others_stay_compiled(notes: list[tuple[str, str]]) -> None:
    module, backend = Block(), Backend(refuses=(5,))
    module.compile(backend=backend, dynamic=False)
    runtime = runtime_of(module, notes)
    for rows in (2, 5, 5, 2):
        assert torch.equal(ran(runtime, module, torch.ones(rows, 8)), module.forward(torch.ones(rows, 8)))
        assert runtime.variant == ("compiled" if rows == 2 else "eager")
    assert (len(notes), backend.num_graphs) == (1, 1)
    assert "some calls" in notes[0][1]
    assert module._compiled_call_impl is not None


def test_exact_call_never_runs_what_is_compiled(notes: list[tuple[str, str]]) -> None:
    module, backend = Block(), Backend()
    module.compile(backend=backend)
    call = call_of(module, torch.ones(2, 8))
    call.is_exact, call.runtime = True, runtime_of(module, notes)
    tick = Executor(runtime=call.runtime).run([call])
    assert torch.equal(values(tick.outcomes)[0], module.forward(torch.ones(2, 8)))
    assert (backend.num_graphs, tick.variant) == (0, "eager")
    ran(call.runtime, module, torch.ones(2, 8))
    assert (backend.num_graphs, call.runtime.variant) == (1, "compiled")


def test_wrong_call_of_a_compiled_component_is_not_the_compilers_fault(notes: list[tuple[str, str]]) -> None:
    module = Block()
    module.compile(backend=Backend())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ran(runtime_of(module, notes), module, torch.ones(2, 9))
    assert notes == []
    assert module._compiled_call_impl is not None


def test_arguments_of_another_precision_are_cast_for_a_compiled_component_too(notes: list[tuple[str, str]]) -> None:
    module = Block().to(torch.bfloat16)
    module.compile(backend=Backend())
    assert ran(runtime_of(module, notes), module, torch.ones(2, 8)).dtype is torch.bfloat16
    assert notes == []
    assert module._compiled_call_impl is not None


def test_time_of_a_forward_that_compiled_is_not_learned(notes: list[tuple[str, str]]) -> None:
    module = Block()
    module.compile(backend=Backend(), dynamic=True)
    runtime = runtime_of(module, notes)
    executor = Executor(runtime=runtime)
    is_timed = []

    def started() -> None:
        runtime.num_compilations += 1

    with watched_compilations(started, lambda: None):
        for rows in (1, 1, 2, 3, 1):
            tick = executor.run([call_of(module, torch.ones(rows, 8))])
            is_timed.append(tick.is_timed)
    # One row is compiled by itself, several are one form.
    assert is_timed == [False, True, False, True, True]


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("has_blocks", [True, False], ids=["by layers", "whole"])
def test_compiled_rows_are_the_same_alone_in_company_and_eagerly(
    has_blocks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compilations: list[None] = []
    torch.manual_seed(0)
    module = Denoiser() if has_blocks else Block()
    rows = torch.randn(3, 8)
    with torch.no_grad():
        eager = module(rows)
    compile_components({"transformer": module})
    runtime = Runtime(None, {module: "transformer"})
    executor = Executor(runtime=runtime)
    with watched_compilations(lambda: compilations.append(None), lambda: None):
        singly = [values(executor.run([call_of(module, row[None])]).outcomes)[0] for row in rows]
        together = ran(runtime, module, rows)
    assert compilations
    torch.testing.assert_close(torch.cat(singly), together, atol=1e-5, rtol=0)
    torch.testing.assert_close(together, eager, atol=1e-4, rtol=0)
    decompile(module.modules())
    with torch.no_grad():
        assert torch.equal(module(rows), eager)


class Hungry(nn.Module):
    """Needs the memory that another component takes."""

    def __init__(self, other: nn.Linear, waiting_at: int) -> None:
        super().__init__()
        self.other = [other]
        self.waiting_at = waiting_at
        self.num_calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        if self.other[0].weight.data_ptr() != self.waiting_at:
            raise torch.OutOfMemoryError("out of memory")
        return x


def test_others_leave_the_device_where_memory_is_too_small() -> None:
    other = nn.Linear(2, 2)
    hungry = Hungry(other, other.weight.data_ptr())
    residency = Residency(
        None, {"other": (other, Weights(other, torch.device("cpu"), pins=False))}, free_bytes=lambda: 2**30
    )
    runtime = Runtime(residency)
    residency.expect([other])
    residency.bring(other)
    assert torch.equal(runtime.run(Invocation(hungry, "forward", (torch.ones(1),))), torch.ones(1))
    assert (hungry.num_calls, residency.held) == (2, ())


def test_memory_that_nobody_else_takes_is_missing() -> None:
    hungry = Hungry(nn.Linear(2, 2), 0)
    with pytest.raises(torch.OutOfMemoryError):
        Runtime().run(Invocation(hungry, "forward", (torch.ones(1),)))
    assert hungry.num_calls == 1


def test_forward_inside_of_which_other_ranks_wait_is_not_begun_once_more() -> None:
    other = nn.Linear(2, 2)
    hungry = Hungry(other, other.weight.data_ptr())
    residency = Residency(None, {"other": (other, Weights(other, torch.device("cpu"), pins=False))})
    runtime = Runtime(residency)
    residency.expect([other])
    residency.bring(other)
    with pytest.raises(torch.OutOfMemoryError):
        runtime.run_here(Invocation(hungry, "forward", (torch.ones(1),), is_shared=True))
    # The next one has the room.
    assert (hungry.num_calls, residency.held) == (1, ())


class Decoder(nn.Module):
    """A decoder of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(latents)
        return result


def test_decoders_take_fast_kernels_on_a_gpu_and_exact_requests_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "spread_group_norm", lambda x, *_, **__: x)
    vae, latents = Decoder().bfloat16(), torch.randn(1, 4, norms.MIN_VALUES, dtype=torch.bfloat16)
    on_gpu, on_cpu = (Runtime(Residency(torch.device(name))) for name in ("cuda", "cpu"))
    assert on_gpu.run(Invocation(vae, "decode", (latents,))) is latents
    for runtime, is_exact in ((on_gpu, True), (on_cpu, False)):
        result = runtime.run(Invocation(vae, "decode", (latents,), is_exact=is_exact))
        assert torch.equal(result, vae.decode(latents))
