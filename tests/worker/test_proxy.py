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
from sgld.worker.calls import Call, current_context
from sgld.worker.executor import single
from sgld.worker.proxy import ComponentProxy
from worker.requests import Doubling, calls_until_end, request, running, values


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
