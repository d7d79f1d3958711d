"""Which components are divided, decided before anything is loaded."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pipelines.flux import SIZES as FLUX_SIZES
from pipelines.parts import clip, t5

from sgld.errors import ModelError
from sgld.models.roles import Role
from sgld.models.sources import ComponentSource
from sgld.models.tensor_choice import Divided, choose
from sgld.parallel import ParallelConfig


@dataclass(frozen=True)
class Part:
    name: str
    library: str
    class_name: str
    source: ComponentSource = field(default_factory=lambda: ComponentSource("nowhere"))
    auto_class: str | None = None
    weights: Any = None
    quantization: Any = None


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Role]]:
    folder = tmp_path_factory.mktemp("model")
    clip().save_pretrained(folder / "text_encoder")
    t5().save_pretrained(folder / "text_encoder_2")
    sizes = {
        "transformer": {"in_channels": 4, **FLUX_SIZES},
        "unet": {"num_layers": 1, "num_attention_heads": 2, "caption_projection_dim": 16},
    }
    for name, config in sizes.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        (folder / name / "diffusion_pytorch_model.safetensors").touch()

    def part(name: str, library: str, class_name: str, role: Role, **more: Any) -> tuple[Any, Role]:
        return Part(name, library, class_name, ComponentSource(str(folder / name)), **more), role

    return {
        "clip": part("text_encoder", "transformers", "CLIPTextModel", "text_encoder"),
        "t5": part("text_encoder_2", "transformers", "T5EncoderModel", "text_encoder"),
        "flux": part("transformer", "diffusers", "FluxTransformer2DModel", "dit"),
        "quantized": part("transformer", "diffusers", "FluxTransformer2DModel", "dit", quantization="nf4"),
        "other weights": part("transformer", "diffusers", "FluxTransformer2DModel", "dit", weights="there"),
        "sd3": part("unet", "diffusers", "SD3Transformer2DModel", "dit"),
        "own code": part("own", "transformers", "Mine", "text_encoder", auto_class="AutoModel"),
        "vae": part("vae", "diffusers", "AutoencoderKL", "vae"),
    }


def test_text_encoders_and_denoisers_with_a_plan_are_divided(parts: dict[str, tuple[Any, Role]]) -> None:
    parallel = ParallelConfig(tp_size=2)
    chosen = choose([parts[name] for name in ("clip", "t5", "flux", "vae")], None, parallel)
    assert chosen.names == ("text_encoder", "text_encoder_2", "transformer")
    assert chosen.said["text_encoder"] == "each of 2 ranks has parts of its layers"
    assert choose(parts.values(), None, ParallelConfig()) == Divided()


def test_what_has_no_plan_is_whole_and_said_to_be(parts: dict[str, tuple[Any, Role]]) -> None:
    chosen = choose([parts[name] for name in ("t5", "sd3", "own code")], None, ParallelConfig(tp_size=2))
    assert chosen.names == ("text_encoder_2",)
    assert chosen.said["unet"] == "whole: nothing says how its layers are divided"
    assert chosen.said["own"] == "whole: Mine isn't a model of transformers or diffusers"


@pytest.mark.parametrize(
    ("names", "size", "problem"),
    [
        (["sd3", "vae"], 2, r"nothing of this model can be divided \(unet: nothing says how .*\); leave it at 1"),
        (["clip"], 3, r"text_encoder \(CLIPTextModel\) can't be divided by tp_size 3: it has 4 attention heads"),
        (["t5", "flux"], 4, r"transformer \(Flux.*\) can't be divided by tp_size 4: it has 2 attention heads, and 2"),
        (
            ["t5", "quantized"],
            2,
            r"transformer \(Flux.*\) is quantized, and ranks can't have parts of quantized layers",
        ),
        (["t5", "other weights"], 2, r"transformer \(Flux.*\) has weights of its own, of which ranks can't read parts"),
    ],
)
def test_what_cannot_work_is_refused(
    names: list[str], size: int, problem: str, parts: dict[str, tuple[Any, Role]]
) -> None:
    with pytest.raises(ModelError, match=problem):
        choose([parts[name] for name in names], None, ParallelConfig(tp_size=size))


def test_weights_in_one_file_are_refused(parts: dict[str, tuple[Any, Role]]) -> None:
    with pytest.raises(ModelError, match=r"the weights are in one file \(model.safetensors\)"):
        choose(parts.values(), Path("model.safetensors"), ParallelConfig(tp_size=2))
