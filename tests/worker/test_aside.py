"""The process that compiles, itself."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from sgld.worker.aside import CompilerProcess, Known, Watch
from sgld.worker.compiler import CompileJob, CompileResult, TorchState, graphs_of_cache, run_job
from sgld.worker.graphs import graphs_on
from sgld.worker.invocation import Invocation
from sgld.worker.runtime import Runtime
from sgld.worker.sketch import sketched
from sgld.worker.swap import Swap
from worker.layered import Block, Denoiser
from worker.requests import Doubling

pytestmark = pytest.mark.long


class Shifting(nn.Module):
    """Its epsilon is a float, which no variable may be made of."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.eps


def waited(process: CompilerProcess) -> CompileResult:
    for _ in range(12_000):
        if (result := process.result()) is not None:
            return result
        time.sleep(0.02)
    raise AssertionError("the process isn't done after four minutes")


def jobs_of(module: nn.Module, x: torch.Tensor) -> list[CompileJob]:
    with torch.no_grad(), Watch([module]) as watch:
        module(x)
    return watch.jobs()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++, which isn't here")
def test_what_the_process_compiled_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # Headers that are compiled in advance take longer than one small graph.
    monkeypatch.setenv("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
    jobs = jobs_of(Shifting(), torch.ones(2, 8))
    with CompilerProcess(jobs) as process:
        result = waited(process)
    assert (result.problem, result.num_compiled) == (None, 1)
    num_found, num_missed = graphs_of_cache()
    num_lowered = counters["aot_autograd"]["autograd_cache_hit"]
    with torch._inductor.config.patch(cpp_cache_precompile_headers=False):
        run_job(jobs[0])
    assert graphs_of_cache() == (num_found + 1, num_missed)
    # Nor is it lowered again, which takes as long as the trace itself.
    assert counters["aot_autograd"]["autograd_cache_hit"] == num_lowered + 1
    torch._dynamo.reset()


def test_problem_of_the_process_is_told() -> None:
    job = CompileJob(b"nothing", b"", TorchState.now())
    with CompilerProcess([job]) as process:
        assert "UnpicklingError" in str(waited(process).problem)


def test_process_that_is_closed_is_gone() -> None:
    process = CompilerProcess([])
    process.close()
    assert "ended with status -9" in str(process.result() and process.result().problem)  # type: ignore[union-attr]


def test_jobs_are_known_by_what_they_are(tmp_path: Path) -> None:
    known, (job,) = Known(tmp_path), jobs_of(Doubling(), torch.ones(2, 8))
    assert not known.has(job)
    known.add(job)
    assert Known(tmp_path).has(jobs_of(Doubling(), torch.ones(2, 8))[0])
    assert not known.has(jobs_of(Doubling(), torch.ones(3, 8))[0])
    assert not Known(None).has(job)


def test_of_those_who_want_the_same_one_compiles_it(tmp_path: Path) -> None:
    first, second = Known(tmp_path), Known(tmp_path)
    small, large, other = (jobs_of(m, torch.ones(n, 8)) for m, n in ((Doubling(), 2), (Doubling(), 3), (nn.ReLU(), 2)))
    assert first.claim(small)
    assert not second.claim(large)
    assert not second.claim([*other, *large])
    assert first.claim(other)
    first.release()
    assert second.claim([*other, *large])
    assert not first.claim(other)
    second.release()


def test_state_of_torch_is_told_and_entered() -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state = TorchState.now()
    assert (state.is_grad_enabled, state.autocast) == (False, (("cpu", torch.bfloat16),))
    with state.entered():
        assert TorchState.now() == state
    assert sketched(state)


@pytest.mark.gpu
@pytest.mark.timeout(300)
@torch.no_grad()
def test_on_a_gpu_code_of_the_process_is_taken_over_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From eager calls over graphs of these to graphs of compiled code, while none waits for a compiler."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    device, module = torch.device("cuda"), Denoiser()
    module.layers = nn.ModuleList(Block() for _ in range(30))
    module.to(device)
    notes: list[str] = []
    runtime = Runtime(graphs=graphs_on(device, 2**30, {"transformer": module}))
    runtime.swap = Swap(
        {module: "transformer"}, note=lambda _, note: notes.append(note), changed=runtime.forget, cache=tmp_path
    )
    variants: list[str] = []
    longest_s, deadline = 0.0, time.monotonic() + 240
    while variants[-3:] != ["compiled graph"] * 3 and time.monotonic() < deadline:
        x = torch.randn(2, 8, device=device)
        runtime.look()
        start = time.perf_counter()
        result = runtime.run(Invocation(module, "forward", (x,), fixed=()))
        torch.cuda.synchronize()
        longest_s = max(longest_s, time.perf_counter() - start)
        torch.testing.assert_close(result, _eager(module, x), atol=1e-4, rtol=1e-4)
        variants += [runtime.variant] if variants[-3:] != [runtime.variant] * 3 else []
    runtime.close()
    torch._dynamo.reset()
    assert variants[-3:] == ["compiled graph"] * 3, (variants, notes)
    assert notes == ["compiled"]
    assert "graph" in variants
    print(f"longest call {longest_s:.2f} s, {variants}")


def _eager(module: Denoiser, x: torch.Tensor) -> torch.Tensor:
    for layer in module.layers:
        x = layer.forward(x)
    return x
