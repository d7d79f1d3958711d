"""What several ranks share, decided before anything is loaded."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sgld.config import EngineConfig
from sgld.errors import ModelError
from sgld.models.sharing import NOTHING, share
from sgld.models.sources import ComponentSource
from sgld.parallel import ParallelConfig


@dataclass(frozen=True)
class Part:
    name: str
    class_name: str
    source: ComponentSource = field(default_factory=lambda: ComponentSource("nowhere", None, None))
    library: str = "diffusers"
    auto_class: str | None = None
    weights: None = None
    quantization: None = None


def config(**parallel: Any) -> EngineConfig:
    return EngineConfig(parallel=ParallelConfig(**parallel))


VAE = Part("vae", "AutoencoderKL")


def test_denoisers_and_vaes_are_shared() -> None:
    encoder = Part("text_encoder", "T5EncoderModel", library="transformers")
    parts = [Part("transformer", "FluxTransformer2DModel"), VAE, encoder]
    found = share(parts, config(num_gpus=2), "cpu", is_whole=False)
    assert found.names == {"transformer", "vae"}
    layout = "2 = dp 1 x cfg 1 x sp 2 (ulysses 2 x ring 1) x tp 1"
    assert found.notes == (layout, "tokens of transformer are shared by 2 ranks")
    assert share(parts, config(num_gpus=2, vae_sp=False), "cpu", is_whole=False).vaes == ()
    copies = share(parts, config(dp_size=2), "cpu", is_whole=True)
    assert not copies.names
    assert copies.notes == ("2 = dp 2 x cfg 1 x sp 1 (ulysses 1 x ring 1) x tp 1",)
    assert share(parts, config(), "cpu", is_whole=False) == NOTHING


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("UNet2DConditionModel", "can't share its tokens, as its convolutions see the pixels around each one"),
        ("NoSuchModel", "has no plan of how to split its tokens"),
    ],
)
def test_model_without_a_plan_is_refused_by_name(name: str, why: str) -> None:
    with pytest.raises(ModelError, match=rf"^sp_degree is 2, but unet \({name}\) {why}; use --enable-cfg-parallel"):
        share([Part("unet", name)], config(num_gpus=2), "cpu", is_whole=False)
    assert share([Part("unet", name)], config(enable_cfg_parallel=True), "cpu", is_whole=False).denoisers == ("unet",)
    both = config(num_gpus=8, dp_size=2, enable_cfg_parallel=True)
    with pytest.raises(ModelError, match=r"^sp_degree is 2, but unet .*; use --dp-size 4 instead"):
        share([Part("unet", name)], both, "cpu", is_whole=False)


def test_what_helps_a_denoiser_is_on_rank_0_alone() -> None:
    parts = [Part("controlnet", "FluxControlNetModel"), Part("transformer", "FluxTransformer2DModel")]
    found = share(parts, config(num_gpus=2), "cpu", is_whole=False)
    assert found.denoisers == ("transformer",)
    assert found.notes[-1] == "controlnet runs on rank 0 alone: FluxControlNetModel can't share tokens"


def test_too_few_heads_are_refused_with_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 5}))
    part = Part("transformer", "WanTransformer3DModel", ComponentSource(str(tmp_path), None, None))
    problem = r"\(WanTransformer3DModel\) has 5 attention heads, too few for ulysses_degree 8; use --ring-degree 8"
    with pytest.raises(ModelError, match=problem):
        share([part], config(num_gpus=8), "cpu", is_whole=False)
    # Others are padded.
    for shared in (config(num_gpus=2), config(ulysses_degree=2, ring_degree=2)):
        assert share([part], shared, "cpu", is_whole=False).denoisers == ("transformer",)


def test_pipelines_that_run_whole_have_one_gpu() -> None:
    with pytest.raises(ModelError, match="with --backend diffusers pipelines run their models themselves"):
        share([VAE], config(enable_cfg_parallel=True), "cpu", is_whole=True)


def test_elastic_ranks_all_have_each_denoiser_and_share_it_as_far_as_it_has_heads(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 3}))
    flux = Part("transformer", "FluxTransformer2DModel", ComponentSource(str(tmp_path)))
    found = share(
        [flux, VAE, Part("unet", "UNet2DConditionModel")], config(num_gpus=4, elastic_sp=True), "cpu", is_whole=False
    )
    assert found.names == {"transformer", "unet", "vae"}
    assert found.max_degrees == {"transformer": 2, "unet": 1}
    assert found.notes == ("4 = dp 1 x cfg 1 x sp 1 or 2 or 4 (elastic) x tp 1", "unet runs on one GPU at a time")


def test_elastic_ranks_do_not_compile() -> None:
    asked = EngineConfig(parallel=ParallelConfig(num_gpus=2, elastic_sp=True), enable_torch_compile=True)
    with pytest.raises(ModelError, match="enable_torch_compile is asked for, but with --elastic-sp"):
        share([VAE], asked, "cpu", is_whole=False)
