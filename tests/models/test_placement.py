from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry
from pipelines import build
from worker.requests import picture, request

from sgld.config import EngineConfig
from sgld.errors import ModelError
from sgld.models import load as load_module
from sgld.models.load import load
from sgld.models.placement import compile_module, dtype_of, place, plain
from sgld.parallel import ParallelConfig
from sgld.testing import run_together
from sgld.worker.compilation import watched_compilations

CPU = torch.device("cpu")


def test_denoiser_by_layers_gives_the_pictures_of_a_whole_one() -> None:
    pipeline, kwargs = build("flux")
    expected = [picture(pipeline(**request("flux", index, kwargs))) for index in range(2)]
    # Without streams, which a CPU doesn't have.
    place(pipeline, {"transformer": "layerwise"}, CPU, pins=False)
    assert HookRegistry.check_if_exists_or_initialize(pipeline.transformer.transformer_blocks[0]).hooks
    outputs = run_together(pipeline, [request("flux", index, kwargs) for index in range(2)]).outputs
    for output, alone in zip(outputs, expected, strict=True):
        torch.testing.assert_close(picture(output), alone, atol=1e-5, rtol=0)


def test_component_that_has_no_layers_to_offload_is_told() -> None:
    pipeline, _ = build("sd")
    with pytest.raises(ModelError, match=r"but text_encoder \(CLIPTextModel\) can't be offloaded by layers; use"):
        place(pipeline, {"text_encoder": "layerwise"}, CPU, pins=False)


def test_components_that_are_offloaded_stay_where_they_were_loaded() -> None:
    pipeline, _ = build("sd")
    place(pipeline, {"text_encoder": "offload"}, torch.device("meta"), pins=False)
    assert pipeline.text_encoder.device == CPU
    assert {pipeline.unet.device, pipeline.vae.device} == {torch.device("meta")}


def test_dtype_of_a_model_is_not_that_of_weights_that_it_keeps_in_another() -> None:
    pipeline, _ = build("wan")
    transformer = pipeline.transformer.to(torch.bfloat16)
    first = next(transformer.parameters())
    first.data = first.data.float()
    assert dtype_of(transformer) is torch.bfloat16
    assert dtype_of(torch.nn.Linear(1, 1).half()) is torch.float16


def test_only_what_ranks_share_is_compiled_in_order(
    flux_folder: Path, sdxl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: dict[str, bool] = {}

    def compiles(components: Mapping[str, Any], *, in_order: bool) -> None:
        compiled.update(dict.fromkeys(components, in_order))

    monkeypatch.setattr(load_module, "compile_components", compiles)
    options: Any = {"enable_torch_compile": True}
    two = ParallelConfig(num_gpus=2)
    load(EngineConfig(model_path=str(flux_folder), device="cpu", num_cpu_threads=1, parallel=two, **options), 1)
    load(EngineConfig(model_path=str(sdxl_folder), device="cpu", num_cpu_threads=1, backend="diffusers", **options))
    assert compiled == {"transformer": True, "unet": False}


def test_denoisers_are_compiled_when_asked(sdxl_folder: Path) -> None:
    def loaded(**options: Any) -> Any:
        return load(EngineConfig(model_path=str(sdxl_folder), device="cpu", num_cpu_threads=1, **options))

    def num_compiled(component: torch.nn.Module) -> int:
        return sum(part._compiled_call_impl is not None for part in component.modules())

    # Pipelines that run whole compile them in their calls; else another process does, and later.
    aside, model = loaded(enable_torch_compile=True), loaded(enable_torch_compile=True, backend="diffusers")
    assert aside.compiled == model.compiled == ("unet",)
    assert num_compiled(aside.pipeline.unet) == 0
    assert num_compiled(model.pipeline.unet) > 1
    assert num_compiled(model.pipeline.vae) == num_compiled(model.pipeline.text_encoder) == 0
    assert num_compiled(loaded().pipeline.unet) == 0


@contextmanager
def counted() -> Iterator[list[None]]:
    """While the block runs, one more for each compilation, all of them without a compiler behind."""
    compilations: list[None] = []
    stance = torch.compiler.set_stance("default", force_backend="eager")
    with stance, watched_compilations(lambda: compilations.append(None), lambda: None):
        yield compilations
    torch._dynamo.reset()


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-6

    def forward(self, text: torch.Tensor, image: torch.Tensor, rotary: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat([text, image], dim=1) * rotary[0] + self.eps


@torch.no_grad()
def test_layer_is_compiled_once_whether_it_is_given_views_or_not() -> None:
    layer = Layer()
    compile_module(layer)
    with counted() as compilations:
        for num_tokens in (4, 6):
            both, rotary = torch.randn(1, num_tokens + 3, 8), torch.randn(num_tokens + 3, 8)
            # What compiled code returns is no view, but has the strides of one.
            text, image = both[:, :3], both[:, 3:]
            given = (text.clone(), image.clone()), (text, image), (text.detach(), image.detach())
            for text, image in given:
                assert torch.equal(layer(text, image, (rotary,)), both * rotary + layer.eps)
    assert len(compilations) == 1


class Scaled(torch.nn.Module):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x * scale


@torch.no_grad()
def test_numbers_that_requests_choose_are_compiled_once() -> None:
    module = Scaled()
    compile_module(module)
    with counted() as compilations:
        for scale in (0.5, 0.6, 0.75):
            assert torch.equal(module(torch.ones(2, 3), scale=scale), torch.full((2, 3), scale))
    assert len(compilations) == 1


def test_module_may_write_into_what_it_is_given() -> None:
    given: dict[str, list[torch.Tensor]] = {"x": [torch.ones(2)]}
    plain(given)["x"].append(torch.ones(3))
    assert len(given["x"]) == 2


def test_what_is_trained_keeps_its_history() -> None:
    base = torch.ones(2, 3, requires_grad=True)
    assert plain({"x": [base[:1]]})["x"][0].grad_fn is not None
