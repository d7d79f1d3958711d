"""Steps of noise schedulers on a device that isn't there: the same bits, and nothing waits for it."""

import copy
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import schedulers

from sgld.worker.host_values import MAX_SILENT, HostTables, Known, answer_from_host
from sgld.worker.steps import WatchedStep
from worker.pretend import DEVICE, Device, OnDevice

CPU = torch.device("cpu")
NUM_STEPS = 6


def put(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    return OnDevice(x) if device == DEVICE else x


def on_host(x: torch.Tensor) -> torch.Tensor:
    return x.on_host if isinstance(x, OnDevice) else x


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def samples(name: str, device: torch.device, on: Device | None = None, *, is_watched: bool = False) -> list[Any]:
    """The samples after each step; `on` has counted what the steps but the first waited for."""
    scheduler = getattr(schedulers, name)()
    if is_watched:
        around = HostTables(scheduler, on_host)
        scheduler.step = WatchedStep(scheduler, around)
    scheduler.set_timesteps(NUM_STEPS, device=device)
    x = put(torch.randn(1, 4, 8, 8, generator=seeded(0)), device) * getattr(scheduler, "init_noise_sigma", 1.0)
    takes = inspect.signature(scheduler.step).parameters
    made = []
    for index, t in enumerate(scheduler.timesteps):
        if index == 1 and on is not None:
            on.waits.clear()
        output = put(torch.randn(1, 4, 8, 8, generator=seeded(index)), device)
        given = {"generator": seeded(index)} if "generator" in takes else {}
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(output + scaled * 0, t, x, return_dict=False, **given)[0]
        assert not isinstance(x, Known)
        made.append(on_host(x).clone())
    assert type(scheduler.timesteps) is (OnDevice if device == DEVICE else torch.Tensor)
    return made


USUAL = (
    "CogVideoXDDIMScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
)


@pytest.mark.parametrize("name", USUAL)
def test_steps_wait_for_nothing_and_make_the_same_bits(name: str) -> None:
    right = samples(name, CPU)
    with Device() as device:
        made = samples(name, DEVICE, device, is_watched=True)
    assert all(torch.equal(one, other) for one, other in zip(made, right, strict=True))
    assert device.waits.total() == 0


def watched_steps(name: str) -> list[bool]:
    """Of each step, whether its timestep came with a copy; the timesteps are set twice."""
    scheduler = getattr(schedulers, name)()
    around, own, seen = HostTables(scheduler, on_host), scheduler.step, []

    def step(output: torch.Tensor, t: torch.Tensor, *args: Any) -> Any:
        seen.append(isinstance(t, Known))
        return own(output, t, *args)

    with Device():
        x = put(torch.randn(1, 4, 8, 8), DEVICE)
        for _ in range(2):
            scheduler.set_timesteps(NUM_STEPS, device=DEVICE)
            for t in scheduler.timesteps:
                around(step, x, t, x)
    return seen


def test_who_asks_for_nothing_any_more_is_left_alone_until_it_has_other_timesteps() -> None:
    """Looking its first timestep up is all that it asks."""
    assert watched_steps("DPMSolverMultistepScheduler") == ([True] * (1 + MAX_SILENT) + [False] * 2) * 2
    assert watched_steps("DDIMScheduler") == [True] * NUM_STEPS * 2
    assert watched_steps("UniPCMultistepScheduler") == [True] * NUM_STEPS * 2


def test_what_meets_others_of_the_device_is_computed_there_alone() -> None:
    known, other = Known(torch.arange(5, device="meta"), torch.arange(5)), torch.ones(2, device="meta")
    one = known[2]
    assert isinstance(one, Known)
    assert [type(x) for x in (other * one, one * other, other.to(one))] == [torch.Tensor] * 3
    later = one.to(torch.float32) + 1
    assert isinstance(later, Known)
    assert (float(later), later.dtype, bool(later > 2), later.cpu().item()) == (3.0, torch.float32, True, 3.0)
    assert torch.arange(10.0)[one].item() == 2.0
    assert (known == one).nonzero().tolist() == [[2]]
    assert isinstance(copy.deepcopy(SimpleNamespace(known=Known(torch.ones(2), torch.ones(2)))).known, Known)


def test_what_is_written_to_is_known_as_it_is_then() -> None:
    with Device() as device:
        known = Known(put(torch.arange(3.0), DEVICE), torch.arange(3.0))
        known[1:] *= 2
        assert device.waits.total() == 0
        assert known.host.tolist() == [0, 2, 4]
        known[:2].add_(put(torch.ones(2), DEVICE))
        assert (known.host.tolist(), on_host(known.there).tolist()) == ([1, 3, 4], [1, 3, 4])


@pytest.mark.parametrize(
    ("name", "second"), [("FlowMatchEulerDiscreteScheduler", OnDevice), ("FlowMatchHeunDiscreteScheduler", Known)]
)
def test_sigmas_are_known_as_long_as_steps_ask_for_them(name: str, second: type) -> None:
    scheduler = getattr(schedulers, name)()
    step, kinds = scheduler.step, []

    def watched(*given: Any) -> None:
        kinds.append(type(scheduler.sigmas))
        step(*given)

    with Device():
        scheduler.set_timesteps(NUM_STEPS, device=DEVICE)
        around, x = HostTables(scheduler, on_host), put(torch.randn(1, 4), DEVICE)
        for t in scheduler.timesteps[:2]:
            around(watched, x, t, x)
    assert kinds == [Known, second]


def test_it_goes_around_the_steps_of_a_pipeline() -> None:
    bound = SimpleNamespace(scheduler=schedulers.DDIMScheduler(), other_scheduler=schedulers.EulerDiscreteScheduler())
    answer_from_host(bound)
    assert isinstance(bound.scheduler.step, WatchedStep)
    assert isinstance(bound.other_scheduler.step, WatchedStep)
    bound.scheduler.set_timesteps(4)
    x = torch.randn(1, 4, 8, 8)
    assert bound.scheduler.step(x, bound.scheduler.timesteps[0], x).prev_sample.shape == x.shape


def test_timesteps_of_the_middle_are_known_and_those_of_others_are_not() -> None:
    """As of a picture that is changed, which begins later; what the pipeline made itself is read as ever."""
    with Device() as device:
        scheduler = schedulers.DDIMScheduler()
        scheduler.step = WatchedStep(scheduler, HostTables(scheduler, on_host))
        scheduler.set_timesteps(NUM_STEPS, device=DEVICE)
        x = put(torch.randn(1, 4, 8, 8), DEVICE)
        late = scheduler.timesteps[2:]
        scheduler.step(x, late[0], x)
        device.waits.clear()
        one = scheduler.step(x, late[1], x).prev_sample
        assert device.waits.total() == 0
        for_rows = HostTables(scheduler, on_host)(lambda t: t, late[1].expand(3))
        assert isinstance(for_rows, Known)
        assert torch.equal(for_rows.host, on_host(late[1]).expand(3))
        assert not isinstance(HostTables(scheduler, on_host)(lambda t: t, late[:2]), Known)
        device.waits.clear()
        other = scheduler.step(x, late[1] + 0, x).prev_sample
        assert device.waits.total() > 0
    assert torch.equal(on_host(one), on_host(other))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_nothing_waits_either(name: str, dtype: torch.dtype) -> None:
    def run(*, is_watched: bool) -> list[torch.Tensor]:
        scheduler = getattr(schedulers, name)()
        if is_watched:
            scheduler.step = WatchedStep(scheduler, HostTables(scheduler))
        scheduler.set_timesteps(NUM_STEPS, device="cuda")
        made = [torch.randn(1, 4, 8, 8, generator=seeded(0)).to("cuda", dtype)]
        outputs = [torch.randn(1, 4, 8, 8, generator=seeded(i)).to("cuda", dtype) for i in range(NUM_STEPS)]
        takes = inspect.signature(scheduler.step).parameters
        for index, t in enumerate(scheduler.timesteps):
            given = {"generator": seeded(index)} if "generator" in takes else {}
            scaled = scheduler.scale_model_input(made[-1], t) if hasattr(scheduler, "scale_model_input") else made[-1]
            torch.cuda.set_sync_debug_mode("error" if is_watched and index else "default")
            try:
                made.append(
                    scheduler.step(outputs[index % NUM_STEPS] + 0 * scaled, t, made[-1], return_dict=False, **given)[0]
                )
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return made

    for one, other in zip(run(is_watched=True), run(is_watched=False), strict=True):
        assert torch.equal(one, other)


def test_without_the_host_they_wait() -> None:
    with Device() as device:
        samples("DDIMScheduler", DEVICE, device)
    assert device.waits.total() > 3 * (NUM_STEPS - 1)
