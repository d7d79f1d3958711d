import contextlib
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from pipelines import build
from torch import nn

from sgld.worker.calls import Call, current_context
from sgld.worker.task import Task
from worker.requests import Doubling, call_of, run_to_end, running


@pytest.mark.parametrize(
    ("component", "method", "kind"),
    [
        ("transformer", "forward", "denoise"),
        ("text_encoder", "forward", "encode"),
        ("text_encoder", "generate", "encode"),
        ("vae", "encode", "encode"),
        ("vae", "decode", "decode"),
    ],
)
def test_kinds_of_calls(component: str, method: str, kind: str) -> None:
    pipeline, _ = build("qwen_image")
    call = call_of(getattr(pipeline, component), torch.ones(2, 3), component=component, method=method)
    assert call.kind == kind


def test_subclass_of_a_denoiser_is_one() -> None:
    class Own(FluxTransformer2DModel):  # type: ignore[misc]
        """As remote code has them."""

    pipeline, _ = build("flux")
    pipeline.transformer.__class__ = Own
    assert call_of(pipeline.transformer, torch.ones(1)).kind == "denoise"


def test_rows_and_cost_key_come_from_the_shapes() -> None:
    module = Doubling()
    two = call_of(module, torch.tensor(0.5), {"x": torch.ones(2, 8)}, ids=torch.ones(5, 3))
    three = call_of(module, torch.tensor(0.1), {"x": torch.zeros(3, 8)}, ids=torch.ones(5, 3))
    wider = call_of(module, torch.tensor(0.5), {"x": torch.ones(2, 9)}, ids=torch.ones(5, 3))
    assert (two.rows, three.rows) == (2, 3)
    assert two.cost_key == three.cost_key != wider.cost_key
    assert call_of(module, "no tensor").rows == 1


def test_rows_of_a_list_are_its_items() -> None:
    """As Z-Image has them: pictures of 16 channels, and texts of any length."""

    def listed(*lengths: int, width: int = 4) -> Call:
        pictures = [torch.zeros(16, 1, 4, width) for _ in lengths]
        return call_of(nn.Identity(), pictures, torch.zeros(len(lengths)), [torch.zeros(n, 8) for n in lengths])

    one, two, wider = listed(5), listed(7, 9), listed(5, width=6)
    assert (one.rows, two.rows) == (1, 2)
    assert one.cost_key == two.cost_key != wider.cost_key


class Witness(nn.Module):
    """Tells under which state of torch it runs."""

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {
            "grad": torch.is_grad_enabled(),
            "autocast": torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
            "device": torch.empty(0).device.type,
            "product": (x @ x).dtype,
        }


def witnessed(*contexts: Any) -> dict[str, Any]:
    """What a forward saw that a task asked for inside some contexts, and this thread ran."""

    def body(task: Task) -> Any:
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            x = torch.ones(2, 2, device="cpu")
            return task.hand_over(Call("request", "m", Witness(), "forward", (x,), {}, current_context()))

    return dict(run_to_end(running(body)))


def test_forward_runs_under_the_grad_mode_of_its_task() -> None:
    assert witnessed(torch.no_grad())["grad"] is False
    assert witnessed(torch.enable_grad())["grad"] is True
    with torch.no_grad():
        assert witnessed(torch.enable_grad())["grad"] is True
    assert torch.is_grad_enabled()


def test_forward_runs_under_the_autocast_of_its_task() -> None:
    seen = witnessed(torch.autocast("cpu", torch.bfloat16))
    assert (seen["autocast"], seen["product"]) == (torch.bfloat16, torch.bfloat16)
    assert witnessed()["autocast"] is False
    assert not torch.is_autocast_enabled("cpu")


def test_forward_runs_under_the_default_device_of_its_task() -> None:
    assert witnessed(torch.device("meta"))["device"] == "meta"
    assert witnessed()["device"] == "cpu"
    assert torch.empty(0).device.type == "cpu"


def test_state_of_one_task_is_not_that_of_another() -> None:
    def body(task: Task) -> bool:
        with torch.no_grad():
            task.hand_over(call_of(Doubling(), torch.ones(1)))
        return torch.is_grad_enabled()

    first, second = running(body), running(body)
    assert run_to_end(first) is True
    assert run_to_end(second) is True
