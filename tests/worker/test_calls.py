import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FirstBlockCacheConfig, FluxTransformer2DModel
from pipelines import build
from pipelines.parts import clip
from torch import nn
from transformers import CLIPTextModel

from sgld.worker.binding import bind
from sgld.worker.calls import Call, ComponentProxy, current_context
from sgld.worker.executor import single
from sgld.worker.task import Task
from worker.requests import Doubling, call_of, calls_until_end, request, run_to_end, running, values


class Recorder:
    """Takes the place of a task: runs each call at once and keeps it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.touched: list[str] = []

    def proxy(self, real: nn.Module, name: str = "transformer") -> Any:
        return ComponentProxy(real, name, self.hand_over, lambda _component, what: self.touched.append(what))

    def hand_over(self, proxy: ComponentProxy, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls.append(proxy.call(method, args, kwargs, "request"))
        return values([single(self.calls[-1])])[0]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def test_proxy_is_an_instance_of_what_it_stands_for(recorder: Recorder) -> None:
    pipeline, _ = build("flux")
    transformer = recorder.proxy(pipeline.transformer)
    encoder = recorder.proxy(pipeline.text_encoder)
    assert isinstance(transformer, FluxTransformer2DModel)
    assert isinstance(transformer, nn.Module)
    assert isinstance(encoder, CLIPTextModel)
    assert not isinstance(encoder, AutoencoderKL)
    assert transformer.__module__ == pipeline.transformer.__module__


def test_proxy_has_the_attributes_of_the_component(recorder: Recorder) -> None:
    pipeline, _ = build("flux")
    real, proxy = pipeline.transformer, recorder.proxy(pipeline.transformer)
    assert proxy.config is real.config
    assert (proxy.dtype, proxy.device) == (torch.float32, torch.device("cpu"))
    assert proxy.pos_embed is real.pos_embed
    assert next(proxy.parameters()) is next(real.parameters())
    assert hasattr(proxy, "config")
    assert not hasattr(proxy, "no_such_thing")
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = proxy.no_such_thing
    assert recorder.touched == []


class Walked(Doubling):
    """Counts how often it is asked for its dtype, for which models walk through all of their parts."""

    num_walks = 0

    @property
    def dtype(self) -> torch.dtype:
        self.num_walks += 1
        return torch.float32


def test_steps_of_a_task_do_not_walk_through_its_models() -> None:
    module = Walked()
    proxy: Any = ComponentProxy(module, "denoiser", lambda *_: None, lambda *_: None)
    for _ in range(3):
        assert proxy.dtype is torch.float32
        single(Call("r", "denoiser", module, "forward", (torch.ones(1, 2),), {}, current_context()))
    assert module.num_walks == 1


def test_submodule_is_called_at_once(recorder: Recorder) -> None:
    encoder = recorder.proxy(clip())
    x = torch.randn(1, 3, 32)
    assert torch.equal(encoder.final_layer_norm(x), encoder.real.final_layer_norm(x))
    assert recorder.calls == []


@pytest.mark.parametrize("move", ["to", "cuda", "cpu", "half", "float", "bfloat16", "eval", "train", "requires_grad_"])
def test_component_is_not_moved_cast_or_frozen_by_a_request(recorder: Recorder, move: str) -> None:
    module = Doubling()
    proxy = recorder.proxy(module)
    assert getattr(proxy, move)(*[torch.float16] if move == "to" else []) is proxy
    assert module.weight.dtype is torch.float32
    assert module.weight.requires_grad
    assert module.training


def test_modules_of_a_proxy_are_none(recorder: Recorder) -> None:
    """So that scaling LoRA layers for one request leaves those of the others alone."""
    assert list(recorder.proxy(clip()).modules()) == []


@pytest.mark.parametrize("name", ["set_attn_processor", "attn_processors", "named_modules"])
def test_who_asks_for_the_processors_is_about_to_change_them(recorder: Recorder, name: str) -> None:
    pipeline, _ = build("flux")
    getattr(recorder.proxy(pipeline.transformer), name)
    assert recorder.touched == [f"transformer.{name}"]


def test_assignment_reaches_the_component_and_is_told(recorder: Recorder) -> None:
    module = Doubling()
    proxy = recorder.proxy(module)
    proxy.max_seq = 7
    assert vars(module)["max_seq"] == 7
    assert recorder.touched == ["transformer.max_seq = ..."]


def test_methods_keep_their_signature(recorder: Recorder) -> None:
    pipeline, _ = build("flux")
    proxy = recorder.proxy(pipeline.vae, "vae")
    assert proxy.decode.__name__ == "decode"
    assert proxy.decode.__doc__ == pipeline.vae.decode.__doc__


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


class Cached(nn.Module):
    """A denoiser with a cache that may be on."""

    def __init__(self, *, is_on: bool) -> None:
        super().__init__()
        self.is_cache_enabled = is_on
        self.entered: list[Any] = []

    @contextlib.contextmanager
    def cache_context(self, name: str, **fields: Any) -> Iterator[None]:
        self.entered.append((name, fields))
        yield

    def _reset_stateful_cache(self) -> None:
        raise AssertionError("wipes the caches of all requests")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("is_on", [True, False])
def test_cache_context_is_entered_around_the_forward_where_a_cache_is_on(recorder: Recorder, is_on: bool) -> None:
    module = Cached(is_on=is_on)
    proxy = recorder.proxy(module)
    with proxy.cache_context("cond", step=1):
        assert module.entered == []
        proxy(torch.ones(1))
    proxy(torch.ones(1))
    assert module.entered == ([("cond", {"step": 1})] if is_on else [])
    contexts = [call.context.cache for call in recorder.calls]
    assert contexts == [("cond", (("step", 1),)) if is_on else None, None]


def test_cache_of_other_requests_is_not_reset(recorder: Recorder) -> None:
    recorder.proxy(Cached(is_on=True))._reset_stateful_cache()


def test_contexts_of_diffusers_caches_are_part_of_the_call() -> None:
    pipeline, kwargs = build("qwen_image")
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    task = running(lambda task: bind(pipeline, task)(**request("qwen_image", 0, kwargs)))
    names = [call.context.cache for call in calls_until_end(task) if call.kind == "denoise"]
    assert {name[0] for name in names if name} == {"cond", "uncond"}
    assert None not in names


def test_block_is_entered_around_the_forward_in_the_executors_thread(recorder: Recorder) -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        seen.append("in")
        yield
        seen.append("out")

    proxy = recorder.proxy(Doubling())
    proxy.enter_around("forward", around)
    proxy(torch.ones(1))
    assert seen == ["in", "out"]
