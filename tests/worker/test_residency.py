"""Offloaded components: who is on the device when, and that nobody computes with weights that aren't there."""

import gc
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pipelines import build
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from sgld.messages import Pending
from sgld.outcome import Value
from sgld.sampling_params import FirstBlockCache
from sgld.testing import run_together
from sgld.worker.binding import bind, release
from sgld.worker.calls import Call
from sgld.worker.executor import Executor
from sgld.worker.invocation import Invocation
from sgld.worker.job import Job
from sgld.worker.lanes import Lanes
from sgld.worker.residency import Held, Residency, Weights, leaving
from sgld.worker.runtime import Runtime
from sgld.worker.session import Session
from sgld.worker.task import Task
from worker.requests import picture, request

CPU = torch.device("cpu")


class Poisoned(Weights):
    """Weights of which only the copy on the device is of use: those that wait are no numbers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, CPU, pins=False)
        self.num_brought = 0
        self._poison()

    def bring(self) -> None:
        super().bring()
        self.num_brought += 1

    def drop(self) -> None:
        super().drop()
        self._poison()

    def _poison(self) -> None:
        for tensor in self._tensors():
            if tensor.is_floating_point():
                tensor.data = torch.full_like(tensor.data, float("nan"))


def poisoned(pipeline: Any, *names: str, free_bytes: int = 2**40) -> tuple[Residency, dict[str, Poisoned]]:
    weights = {name: Poisoned(pipeline.components[name]) for name in names}
    offloaded: dict[str, tuple[nn.Module, Weights]] = {
        name: (pipeline.components[name], found) for name, found in weights.items()
    }
    return Residency(CPU, offloaded, lambda: free_bytes), weights


def running(residency: Residency) -> Executor:
    return Executor(runtime=Runtime(residency))


def in_turns(pipeline: Any, calls: list[dict[str, Any]], executor: Executor) -> tuple[list[Any], list[str]]:
    """Run requests at once, each tick another one's call; what they returned, and whose calls ran in which order."""
    waiting: dict[str, dict[int, str]] = {str(index): {} for index in range(len(calls))}
    ends: dict[str, Any] = {}
    ran: list[str] = []

    def emit(news: Sequence[Any]) -> None:
        for reply in news:
            if isinstance(reply, Pending):
                waiting[reply.call.request_id][reply.call.id] = reply.call.component

    def ended(task: Task, outcome: Any) -> None:
        del waiting[task.request_id]
        ends[task.request_id] = outcome.value if isinstance(outcome, Value) else outcome.error

    session = Session(executor, emit, ended)
    for index, kwargs in enumerate(calls):
        session.start(Job(str(index), pipeline, kwargs))
    while waiting:
        for pending in list(waiting.values()):
            call_id = min(pending)
            ran.append(pending.pop(call_id))
            session.run([call_id])
    return [ends[str(index)] for index in range(len(calls))], ran


@pytest.mark.parametrize(
    ("held", "needed", "free", "left"),
    [
        ([], 10, 0, ()),
        ([Held("text_encoder", 5, False)], 10, 100, ("text_encoder",)),
        ([Held("text_encoder", 5, True)], 10, 100, ()),
        ([Held("text_encoder", 5, True)], 0, 0, ()),
        ([Held("text_encoder", 5, True), Held("transformer", 50, True)], 10, 5, ("text_encoder",)),
        ([Held("text_encoder", 5, True), Held("transformer", 50, True)], 20, 5, ("text_encoder", "transformer")),
        ([Held("vae", 5, True), Held("transformer", 50, False)], 40, 5, ("transformer",)),
    ],
    ids=["nobody", "not awaited", "awaited", "already there", "no room", "no room for two", "unneeded goes first"],
)
def test_who_leaves(held: list[Held], needed: int, free: int, left: tuple[str, ...]) -> None:
    assert leaving(needed, held, free) == left


def test_weights_come_and_go_as_other_contents_of_the_same_tensors() -> None:
    module = nn.BatchNorm1d(4).eval()
    tensors = [*module.parameters(), *module.buffers()]
    before, versions = [tensor.clone() for tensor in tensors], [tensor._version for tensor in tensors]
    weights = Weights(module, CPU, pins=False)
    waiting = [tensor.data_ptr() for tensor in tensors]
    weights.bring()
    assert all(tensor.data_ptr() != where for tensor, where in zip(tensors, waiting, strict=True))
    there = weakref.ref(module.weight.untyped_storage())
    weights.drop()
    gc.collect()
    assert there() is None, "what was on the device is still somewhere"
    assert [tensor.data_ptr() for tensor in tensors] == waiting
    assert all(torch.equal(tensor, was) for tensor, was in zip(tensors, before, strict=True))
    # What was encoded before is found by these.
    assert [tensor._version for tensor in tensors] == versions


def test_what_is_written_on_the_device_comes_home() -> None:
    module = nn.Linear(2, 2)
    weights = Weights(module, CPU, pins=False)
    weights.bring()
    with torch.no_grad():
        module.weight.fill_(7.0)
    module.register_parameter("added", nn.Parameter(torch.ones(3)))
    weights.drop()
    weights.bring()
    assert torch.equal(module.weight, torch.full((2, 2), 7.0))
    assert torch.equal(module.get_parameter("added"), torch.ones(3))


def test_quantized_weights_which_are_tensors_of_tensors_come_and_go() -> None:
    module = nn.Linear(2, 2, bias=False)
    inner = TwoTensor(torch.full((2, 2), 3.0), torch.full((2, 2), 4.0))  # type: ignore[no-untyped-call]
    weight: Any = nn.Parameter(inner, requires_grad=False)
    module.weight = weight
    weights = Weights(module, CPU, pins=False)
    waiting = weight.a.data_ptr()
    for _ in range(2):
        weights.bring()
        assert id(next(module.parameters())) == id(weight)
        assert weight.a.data_ptr() != waiting
        weights.drop()
        assert weight.a.data_ptr() == waiting
    assert torch.equal(weight.b, torch.full((2, 2), 4.0))


# Flux.2 uses buffers of its VAE in the task itself.
@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("flux2_klein", ("text_encoder", "transformer", "vae")),
        ("wan_2_2", ("text_encoder", "transformer", "transformer_2", "vae")),
        ("sdxl_img2img", ("text_encoder", "vae")),
    ],
)
def test_requests_in_flight_find_their_components_there(name: str, names: tuple[str, ...]) -> None:
    pipeline, kwargs = build(name)
    expected = [picture(pipeline(**request(name, index, kwargs))) for index in range(3)]
    residency, weights = poisoned(pipeline, *names)
    outputs, _ = in_turns(pipeline, [request(name, index, kwargs) for index in range(3)], running(residency))
    for output, alone in zip(outputs, expected, strict=True):
        torch.testing.assert_close(picture(output), alone, atol=1e-5, rtol=0)
    assert all(found.num_brought for found in weights.values())
    # What this relies on: weights that wait are no numbers.
    residency.make_room(nn.Module())
    assert not picture(pipeline(**request(name, 0, kwargs))).isfinite().all()


def test_components_stay_while_calls_wait_for_them() -> None:
    pipeline, kwargs = build("pixart")
    residency, weights = poisoned(pipeline, "text_encoder", "transformer", "vae")
    # Without merging there is no probe, which has calls of its own.
    executor = Executor(runtime=Runtime(residency), merge=False)
    _, ran = in_turns(pipeline, [request("pixart", index, kwargs) for index in range(3)], executor)
    order = [name for name, before in zip(ran, ["", *ran], strict=False) if name != before]
    assert order == ["text_encoder", "transformer", "vae", "transformer", "vae", "transformer", "vae"]
    # The denoiser stays while others decode; the VAE, which nobody waits for in between, leaves.
    assert {name: found.num_brought for name, found in weights.items()} == {
        "text_encoder": 1,
        "transformer": 1,
        "vae": 3,
    }


def test_where_there_is_no_room_for_two_each_comes_when_it_computes() -> None:
    pipeline, kwargs = build("pixart")
    expected = [picture(pipeline(**request("pixart", index, kwargs))) for index in range(2)]
    residency, weights = poisoned(pipeline, "text_encoder", "transformer", "vae", free_bytes=0)
    outputs, _ = in_turns(pipeline, [request("pixart", index, kwargs) for index in range(2)], running(residency))
    assert len(residency.held) == 1
    assert weights["transformer"].num_brought > 1
    for output, alone in zip(outputs, expected, strict=True):
        torch.testing.assert_close(picture(output), alone, atol=1e-5, rtol=0)


def test_pipelines_are_told_where_components_compute_not_where_they_wait() -> None:
    pipeline, _ = build("sd")
    task = Task("request", lambda task: None)
    bound = bind(pipeline, task, runtime=Runtime(Residency(torch.device("meta"))))
    assert bound._execution_device == bound.device == bound.vae.device == torch.device("meta")
    release(bound)
    task.cancel()


def test_offloaded_denoiser_comes_whole_for_a_step_cache() -> None:
    pipeline, kwargs = build("flux")
    cache = FirstBlockCache(threshold=10, warmup_steps=1, max_skips=1)

    def made(runtime: Runtime | None) -> torch.Tensor:
        (output,) = run_together(pipeline, [request("flux", 0, kwargs)], caches=[cache], runtime=runtime).outputs
        return picture(output)

    expected = made(None)
    residency, _ = poisoned(pipeline, "transformer")
    assert torch.equal(made(Runtime(residency)), expected)


class TooLarge(Poisoned):
    """Weights for which there is no room while others are there."""

    others: Residency

    def bring(self) -> None:
        super().bring()
        if len(self.others.held) > 0:
            raise torch.OutOfMemoryError("out of memory")


def test_where_a_component_has_no_room_after_all_the_others_leave() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    large = TooLarge(other)
    large.others = residency = Residency(CPU, {"one": (one, Poisoned(one)), "other": (other, large)}, lambda: 2**40)
    runtime = Runtime(residency)
    residency.expect([one, other])
    residency.bring(one)
    assert runtime.run(Invocation(other, "forward", (torch.ones(1, 2),))).isfinite().all()
    assert (residency.held, large.num_brought) == (("other",), 2)
    assert one.weight.isnan().all()


def test_components_come_and_go_after_forwards_on_other_streams() -> None:
    leader: Any = SimpleNamespace()
    pipeline, _ = build("pixart")
    residency, weights = poisoned(pipeline, "transformer")
    executor = running(residency)
    lanes = Lanes(executor, leader, CPU)
    assert residency.join == leader.join == lanes.join
    num_brought: list[int] = []
    residency.join = lambda: num_brought.append(weights["transformer"].num_brought)
    residency.bring(pipeline.transformer)
    assert (num_brought, weights["transformer"].num_brought) == ([0], 1)


def test_text_that_was_encoded_before_brings_no_encoder() -> None:
    pipeline, kwargs = build("pixart")
    residency, weights = poisoned(pipeline, "text_encoder")
    executor = Executor(runtime=Runtime(residency))
    calls: list[Call] = []
    for _ in range(2):
        task = Task("request", lambda task: bind(pipeline, task, runtime=executor.runtime)(**kwargs, prompt="a cat"))
        task.advance()
        assert task.call is not None
        calls.append(task.call)
        task.answer(task.call, executor.run([task.call]).outcomes[0])
        residency.make_room(nn.Module())
        task.cancel()
    assert [call.component for call in calls] == ["text_encoder"] * 2
    assert weights["text_encoder"].num_brought == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_weights_leave_the_memory_of_a_gpu() -> None:
    device = torch.device("cuda", 0)
    module = nn.Linear(1024, 1024)
    before = module.weight.clone()
    weights = Weights(module, device, pins=True)
    assert module.weight.is_pinned()
    used = torch.cuda.memory_allocated()
    weights.bring()
    assert torch.cuda.memory_allocated() >= used + weights.size_bytes
    x = torch.ones(1, 1024, device=device)
    torch.testing.assert_close(module(x).cpu(), nn.functional.linear(torch.ones(1, 1024), before, module.bias.cpu()))
    weights.drop()
    del x
    assert torch.cuda.memory_allocated() == used
    assert torch.equal(module.weight, before)
