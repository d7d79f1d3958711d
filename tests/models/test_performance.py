from typing import Any

import pytest
import torch
from torch import nn

from sgld.config import CalibrationConfig, EngineConfig, MemoryConfig
from sgld.models import performance
from sgld.models.performance import Compilation
from sgld.models.roles import places


def chosen(mode: str = "auto", device: str = "cuda", *, is_whole: bool = False, **options: Any) -> Compilation | None:
    config = EngineConfig(memory=MemoryConfig(performance_mode=mode), **options)  # type: ignore[arg-type]
    return performance.choose(config, device, is_whole=is_whole)


class Layers(nn.Module):
    _repeated_blocks = ("Linear",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, device="meta", dtype=torch.float32)


def test_on_a_gpu_large_denoisers_that_repeat_layers_are_compiled_when_it_pays() -> None:
    compilation = chosen()
    assert compilation is not None
    assert compilation.is_aside
    assert compilation.after_s > 0
    denoisers = {"large": Layers(20_000), "small": Layers(8), "whole": nn.Linear(20_000, 20_000, device="meta")}
    names, notes = compilation.components(denoisers)
    assert names == ("large",)
    assert notes["small"] == "not compiled: 0 MiB of weights are few"
    assert notes["whole"] == "not compiled: Linear names no layers that it repeats"


def test_who_calibrates_measures_what_will_run() -> None:
    compilation = chosen(calibration=CalibrationConfig(calibrate=True))
    assert compilation == Compilation(is_aside=True, checks_size=True)
    assert compilation.components({"large": Layers(20_000)})[1] == {"large": "compiled by a process of its own"}


@pytest.mark.parametrize(("mode", "device"), [("auto", "cpu"), ("memory", "cuda"), ("manual", "cuda")])
def test_elsewhere_nothing_is_compiled_by_itself(mode: str, device: str) -> None:
    assert chosen(mode, device) is None


def test_for_speed_all_are_compiled_at_once() -> None:
    compilation = chosen("speed", "cpu")
    assert compilation == Compilation(is_aside=True)
    assert compilation.components({"small": Layers(8)})[0] == ("small",)


def test_what_is_asked_for_by_name_is_done_in_any_mode() -> None:
    for mode in ("auto", "memory", "manual"):
        compilation = chosen(mode, "cpu", enable_torch_compile=True)
        assert compilation == Compilation(is_aside=True, is_asked_for=True)


def test_pipelines_that_run_whole_are_compiled_by_their_calls_if_at_all() -> None:
    assert chosen(is_whole=True) is None
    assert chosen("speed", is_whole=True) is None
    assert chosen(is_whole=True, enable_torch_compile=True) == Compilation(is_asked_for=True)


def test_for_memory_all_is_offloaded_that_can_be() -> None:
    config = EngineConfig(memory=MemoryConfig(performance_mode="memory"))
    roles: Any = {"text_encoder": "text_encoder", "transformer": "dit", "vae": "vae"}
    chosen, _, of_model = places(roles, config, "cuda")
    assert chosen == {"text_encoder": "offload", "transformer": "layerwise", "vae": "offload"}
    # It isn't asked for by name, so nobody is told that there is no image encoder.
    assert of_model == ()


def test_for_memory_a_denoiser_may_be_offloaded_whole() -> None:
    config = EngineConfig(memory=MemoryConfig(performance_mode="memory", dit_cpu_offload=True))
    assert places({"transformer": "dit"}, config, "cuda")[0] == {"transformer": "offload"}
