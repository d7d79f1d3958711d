import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxTransformer2DModel,
    GGUFQuantizationConfig,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from pipelines import BUILDERS, build
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoints import Named, Scales, fp8, in_blocks, nvfp4, with_input_scales, write_folder, write_gguf
from sgld.config import EngineConfig, QuantizationConfig, SourceConfig
from sgld.errors import ModelError
from sgld.models.describe import describe
from sgld.models.linears import QuantizedLinear
from sgld.models.load import LoadedModel, load
from sgld.models.quantization import Quantization
from sgld.models.quantized import load_weights
from sgld.models.weight_files import Weights
from sgld.testing import run_together

pytestmark = pytest.mark.usefixtures("threads_as_before")


@pytest.fixture(scope="module")
def tensors(flux_folder: Path) -> Named:
    """The weights of the model's own transformer."""
    return load_file(flux_folder / "transformer" / "diffusion_pytorch_model.safetensors")


def configured(folder: Path, **options: Any) -> EngineConfig:
    """Components are named as such; what is an option of quantization goes there."""
    values: dict[str, Any] = {n: str(value) if isinstance(value, Path) else value for n, value in options.items()}
    quantized: dict[str, Any] = {n: values.pop(n) for n in QuantizationConfig.__struct_fields__ if n in values}
    paths: dict[str, str] = {name: values.pop(name) for name in ("transformer", "vae") if name in values}
    return EngineConfig(
        model_path=str(folder),
        device="cpu",
        num_cpu_threads=1,
        component_paths=paths,
        quantized=QuantizationConfig(**quantized),
        **values,
    )


def loaded(folder: Path, **options: Any) -> LoadedModel:
    return load(configured(folder, **options))


def failure(folder: Path, **options: Any) -> str:
    """What is told of weights that can't be had; always in one line."""
    with pytest.raises(ModelError) as caught:
        loaded(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def calls(name: str, num_calls: int = 1) -> list[dict[str, Any]]:
    given = {"num_inference_steps": 2, "output_type": "pt", **BUILDERS[name].kwargs}
    return [
        given | {"prompt": prompt, "generator": torch.Generator().manual_seed(seed)}
        for seed, prompt in enumerate(("a red cat", "a dog", "two birds")[:num_calls])
    ]


def picture(pipeline: Any, name: str = "flux") -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return torch.as_tensor(pipeline(**calls(name)[0]).images)


def plain(folder: Path, weights: Named) -> Any:
    """Diffusers' own pipeline, with these weights in its transformer."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.transformer.load_state_dict(weights)
    return pipeline


def assert_same(result: Tensor, expected: Tensor) -> None:
    """Up to the order of summation: where a tensor lies in memory decides which loop multiplies it."""
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=2e-6)


def distance(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        ("rows", "with scales of rows"),
        ("columns", "with scales of rows"),
        ("tensors", "with scales of tensors"),
        ("none", "without scales"),
    ],
)
def test_fp8_file_makes_the_picture_of_the_weights_it_stands_for(
    flux_folder: Path, tensors: Named, tmp_path: Path, scales: Scales, said: str
) -> None:
    made, meant = fp8(tensors, scales)
    file = tmp_path / "w.safetensors"
    save_file(made, file)
    model = loaded(flux_folder, transformer_weights_path=file)
    assert_same(picture(model.pipeline), picture(plain(flux_folder, meant)))
    note = f"fp32; weights of {file}; fp8 {said}, 8 bits (by tensors)"
    assert model.decisions["transformer"] == note
    assert describe(configured(flux_folder, transformer_weights_path=file)).decisions["transformer"] == note
    num_layers = sum(isinstance(module, QuantizedLinear) for module in model.pipeline.transformer.modules())
    assert num_layers == sum(in_blocks(name, tensor) for name, tensor in tensors.items())


def test_fp8_file_as_comfyui_writes_it(flux_folder: Path, tensors: Named, tmp_path: Path) -> None:
    made, meant = fp8(tensors, "tensors")
    mark = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    comfy = {f"model.diffusion_model.{n.replace('weight_scale', 'scale_weight')}": t for n, t in made.items()}
    comfy |= {n.replace("scale_weight", "comfy_quant"): mark.clone() for n in comfy if n.endswith("scale_weight")}
    save_file(comfy | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "w.safetensors")
    model = loaded(flux_folder, transformer_weights_path=tmp_path / "w.safetensors")
    assert_same(picture(model.pipeline), picture(plain(flux_folder, meant)))
    bad = torch.tensor(list(b'{"format": "convrot_w4a4"}'), dtype=torch.uint8)
    save_file(comfy | dict.fromkeys(list(comfy)[-1:], bad), tmp_path / "w.safetensors")
    assert "quantized as convrot_w4a4, float8_e4m3fn" in failure(
        flux_folder, transformer_weights_path=tmp_path / "w.safetensors"
    )


def test_int8_file_makes_the_picture_of_the_weights_it_stands_for(
    flux_folder: Path, tensors: Named, tmp_path: Path
) -> None:
    made, meant = dict(tensors), dict(tensors)
    for name in (name for name, tensor in tensors.items() if in_blocks(name, tensor)):
        scale = tensors[name].abs().amax() / 127
        made[name], made[f"{name}_scale"] = (tensors[name] / scale).round().to(torch.int8), scale
        meant[name] = made[name].float() * scale
    save_file(made, tmp_path / "w.safetensors")
    model = loaded(flux_folder, transformer_weights_path=tmp_path / "w.safetensors")
    assert_same(picture(model.pipeline), picture(plain(flux_folder, meant)))


def test_modelopt_folder_is_a_component_of_its_own(flux_folder: Path, tensors: Named, tmp_path: Path) -> None:
    made, meant = fp8(tensors, "tensors")
    config = FluxTransformer2DModel.load_config(flux_folder / "transformer")
    folder = write_folder(
        tmp_path / "t", with_input_scales(made, 0.02), config, quant_method="modelopt", quant_algo="FP8", ignore=[]
    )
    model = loaded(flux_folder, transformer=folder)
    assert model.decisions["transformer"].endswith(
        "fp8 of ModelOpt with scales of tensors, 8 bits (by config.json); activations in 8 bits, scaled"
    )
    layers = [m for m in model.pipeline.transformer.modules() if isinstance(m, QuantizedLinear)]
    assert {layer.activations for layer in layers} == {"static"}
    # Activations in 8 bits make another picture, but not by much.
    assert 0 < distance(picture(model.pipeline), picture(plain(flux_folder, meant))) < 0.05
    by_weights = loaded(flux_folder, transformer_weights_path=folder)
    assert_same(picture(by_weights.pipeline), picture(model.pipeline))


@pytest.mark.parametrize("scales", ["rows", "tensors"])
def test_names_of_a_model_s_authors_are_translated_with_their_scales(tmp_path: Path, scales: Scales) -> None:
    build("z_image")[0].save_pretrained(tmp_path / "model")
    own = load_file(tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    authors: Named = {}
    for name, tensor in own.items():
        if name.endswith(("to_k.weight", "to_v.weight")):
            continue
        if name.endswith("to_q.weight"):
            # Parts of very different sizes: a scale in the wrong place would show.
            parts = [
                factor * own[name.replace("to_q", part)] for factor, part in ((1, "to_q"), (50, "to_k"), (3, "to_v"))
            ]
            name, tensor = name.replace("to_q", "qkv"), torch.cat(parts)
        for ours, theirs in (
            ("all_final_layer.2-1.", "final_layer."),
            ("all_x_embedder.2-1.", "x_embedder."),
            ("to_out.0", "out"),
            ("norm_q", "q_norm"),
            ("norm_k", "k_norm"),
        ):
            name = name.replace(ours, theirs)
        authors[name] = tensor
    made, meant = fp8(authors, scales)
    save_file(made, tmp_path / "fp8.safetensors")
    save_file(meant, tmp_path / "meant.safetensors")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipeline.transformer = ZImageTransformer2DModel.from_single_file(
        str(tmp_path / "meant.safetensors"), config=str(tmp_path / "model" / "transformer")
    )
    model = loaded(tmp_path / "model", transformer_weights_path=tmp_path / "fp8.safetensors")
    assert_same(picture(model.pipeline, "z_image"), picture(pipeline, "z_image"))


def test_unet_that_is_cast_to_fp8_as_a_whole(sdxl_folder: Path, tmp_path: Path) -> None:
    own = load_file(sdxl_folder / "unet" / "diffusion_pytorch_model.safetensors")
    cast = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in own.items()}
    save_file(cast, tmp_path / "w.safetensors")
    pipeline = DiffusionPipeline.from_pretrained(sdxl_folder)
    pipeline.unet.load_state_dict({name: tensor.float() for name, tensor in cast.items()})
    model = loaded(sdxl_folder, unet_weights_path=tmp_path / "w.safetensors")
    assert_same(picture(model.pipeline, "sdxl"), picture(pipeline, "sdxl"))
    assert "fp8 without scales, 8 bits (by tensors)" in model.decisions["unet"]


def test_scales_of_convolutions_are_those_of_their_rows(sdxl_folder: Path, tmp_path: Path) -> None:
    made = load_file(sdxl_folder / "unet" / "diffusion_pytorch_model.safetensors")
    codes = made["conv_in.weight"].to(torch.float8_e4m3fn)
    scale = torch.linspace(0.5, 2, len(codes))
    save_file(made | {"conv_in.weight": codes, "conv_in.weight_scale": scale}, tmp_path / "w.safetensors")
    unet = loaded(sdxl_folder, unet_weights_path=tmp_path / "w.safetensors").pipeline.unet
    assert torch.equal(unet.conv_in.weight, codes.float() * scale.reshape(-1, 1, 1, 1))


def test_model_that_is_one_file_of_fp8(tmp_path: Path) -> None:
    build("ltx")[0].save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    made, meant = fp8(load_file(weights), "rows")
    names = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"}
    authors: Named = {}
    for name, tensor in made.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        authors[f"model.diffusion_model.{name}"] = tensor
    save_file(authors, tmp_path / "ltx.safetensors")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipeline.transformer.load_state_dict(meant)
    folder = str(tmp_path / "model")
    config = configured(
        tmp_path / "ltx.safetensors", vae=tmp_path / "model", source=SourceConfig(single_file_config=folder)
    )
    model = load(config)
    assert model.decisions["transformer"] == "fp32; fp8 with scales of rows, 8 bits (by tensors)"
    kwargs = calls("ltx")[0]
    expected = torch.as_tensor(pipeline(**calls("ltx")[0]).frames)
    assert_same(torch.as_tensor(model.pipeline(**kwargs).frames), expected)


@pytest.mark.parametrize("as_component", [False, True])
def test_nvfp4_makes_the_picture_of_the_weights_it_stands_for(
    flux_folder: Path, tensors: Named, tmp_path: Path, as_component: bool
) -> None:
    made, meant = nvfp4(tensors)
    config = FluxTransformer2DModel.load_config(flux_folder / "transformer")
    folder = write_folder(tmp_path, made, config, quant_method="modelopt", quant_algo="NVFP4")
    file = folder / "diffusion_pytorch_model.safetensors"
    model = loaded(flux_folder, **({"transformer": folder} if as_component else {"transformer_weights_path": file}))
    assert f"4 bits (by {'config.json' if as_component else 'tensors'})" in model.decisions["transformer"]
    assert_same(picture(model.pipeline), picture(plain(flux_folder, meant)))


def test_model_s_own_transformer_may_be_quantized(flux_folder: Path, tensors: Named, tmp_path: Path) -> None:
    made, meant = fp8(tensors, "rows")
    shutil.copytree(flux_folder, tmp_path / "model")
    config = FluxTransformer2DModel.load_config(flux_folder / "transformer")
    write_folder(tmp_path / "model" / "transformer", made, config, quant_method="fp8", activation_scheme="dynamic")
    model = loaded(tmp_path / "model")
    assert "fp8 with scales of rows, 8 bits (by config.json); activations in 8 bits" in model.decisions["transformer"]
    assert 0 < distance(picture(model.pipeline), picture(plain(flux_folder, meant))) < 0.05


def test_weights_have_the_precision_that_diffusers_gives_them(wan_folder: Path, tmp_path: Path) -> None:
    own = load_file(wan_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(fp8(own, "rows")[0], tmp_path / "w.safetensors")
    ours = loaded(wan_folder, transformer_weights_path=tmp_path / "w.safetensors", dit_precision="bf16")
    theirs = WanTransformer3DModel.from_pretrained(wan_folder / "transformer", dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in theirs.named_parameters()}
    found = {name: parameter.dtype for name, parameter in ours.pipeline.transformer.named_parameters()}
    assert found == {name: dtype for name, dtype in dtypes.items() if name in found}
    assert set(found.values()) == {torch.bfloat16, torch.float32}
    missing = {name.removesuffix(".weight") for name in dtypes.keys() - found.keys()}
    layers = {n for n, m in ours.pipeline.transformer.named_modules() if isinstance(m, QuantizedLinear)}
    assert missing == layers


def test_both_transformers_are_quantized(tmp_path: Path) -> None:
    build("wan_2_2")[0].save_pretrained(tmp_path)
    model = loaded(tmp_path, quantization="int8")
    for name in ("transformer", "transformer_2"):
        layers = [m for m in getattr(model.pipeline, name).modules() if isinstance(m, QuantizedLinear)]
        assert model.decisions[name].endswith(f"; {len(layers)} layers")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("as_component", [False, True])
def test_gguf_makes_the_picture_that_diffusers_makes(
    flux_folder: Path, tensors: Named, tmp_path: Path, kind: str, as_component: bool
) -> None:
    file = write_gguf(tmp_path / f"flux-{kind}.gguf", tensors, kind)
    pipeline = DiffusionPipeline.from_pretrained(flux_folder)
    pipeline.transformer = FluxTransformer2DModel.from_single_file(
        str(file),
        config=str(flux_folder / "transformer"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        dtype=torch.float32,
    )
    model = loaded(flux_folder, **{"transformer" if as_component else "transformer_weights_path": file})
    assert f"gguf {kind}, {kind[1]} bits (by file)" in model.decisions["transformer"]
    assert_same(picture(model.pipeline), picture(pipeline))


@pytest.mark.parametrize("form", ["file", "folder", "index"])
def test_weights_in_full_precision_come_from_elsewhere_too(
    flux_folder: Path, tensors: Named, tmp_path: Path, form: str
) -> None:
    other = {name: tensor * 1.5 for name, tensor in tensors.items()}
    transformer = plain(flux_folder, other).transformer
    transformer.save_pretrained(tmp_path, max_shard_size="1GB" if form == "file" else "40kB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (form != "file")
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    paths = {"file": path, "folder": tmp_path, "index": tmp_path / f"{path.name}.index.json"}
    model = loaded(flux_folder, transformer_weights_path=paths[form])
    assert_same(picture(model.pipeline), picture(plain(flux_folder, other)))
    assert model.decisions["transformer"] == f"fp32; weights of {paths[form]}"


def test_second_transformer_has_weights_of_its_own(wan_folder: Path, tmp_path: Path) -> None:
    assert "has no component 'transformer_2'; it has " in failure(wan_folder, transformer_2_weights_path=tmp_path)


def test_weights_that_lack_some_are_refused(flux_folder: Path, tensors: Named, tmp_path: Path) -> None:
    made, _ = fp8(tensors, "rows")
    name = "transformer_blocks.0.attn.to_q.weight"
    save_file({n: t for n, t in made.items() if not n.startswith(name)}, tmp_path / "w.safetensors")
    message = failure(flux_folder, transformer_weights_path=tmp_path / "w.safetensors")
    assert message == f"{tmp_path}/w.safetensors doesn't fit FluxTransformer2DModel: it has no {name}"


def test_weights_for_another_model_are_refused(flux_folder: Path, tmp_path: Path) -> None:
    save_file({"conv.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "w.safetensors")
    message = failure(flux_folder, transformer_weights_path=tmp_path / "w.safetensors")
    assert message == f"{tmp_path}/w.safetensors doesn't fit FluxTransformer2DModel: it has conv.weight"


def test_library_that_is_missing_is_named_before_anything_is_loaded(flux_folder: Path, tmp_path: Path) -> None:
    save_file({"a.qweight": torch.ones(1), "a.wscales": torch.ones(1)}, tmp_path / "svdq-int4_r32-flux.safetensors")
    message = failure(flux_folder, transformer_weights_path=tmp_path / "svdq-int4_r32-flux.safetensors")
    assert message == (
        "transformer is quantized with svdquant (int4, rank 32), which needs nunchaku; install it: pip install nunchaku"
    )


def test_nunchaku_loads_its_own_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Fast(torch.nn.Linear):
        @classmethod
        def from_pretrained(cls, path: str, torch_dtype: torch.dtype) -> torch.nn.Module:
            assert path == str(tmp_path / "svdq-int4_r32.safetensors")
            return cls(1, 1, dtype=torch_dtype)

    fake = types.ModuleType("nunchaku")
    vars(fake)["NunchakuFluxTransformer2dModel"] = Fast
    monkeypatch.setitem(sys.modules, "nunchaku", fake)
    found = Quantization("svdquant", 4, "int4, rank 32", "file name")
    weights = Weights("svdq", (tmp_path / "svdq-int4_r32.safetensors",))
    model: Any = load_weights(FluxTransformer2DModel, {}, weights, found, torch.bfloat16)
    assert (type(model), model.weight.dtype) == (Fast, torch.bfloat16)
    with pytest.raises(ModelError, match="nunchaku has no ZImageTransformer2DModel; it has NunchakuFlux"):
        load_weights(ZImageTransformer2DModel, {}, weights, found, torch.bfloat16)


ONLINE = ("fp8", "fp8_dynamic", "int8", "int8_dynamic")


@pytest.mark.parametrize("quantization", ONLINE)
def test_denoiser_is_quantized_while_it_is_loaded(flux_folder: Path, quantization: str) -> None:
    model = loaded(flux_folder, quantization=quantization)
    layers = {n: m for n, m in model.pipeline.transformer.named_modules() if isinstance(m, QuantizedLinear)}
    # Of blocks, and not what scales and shifts all of their tokens.
    assert all(name.split(".")[1].isdigit() and "norm" not in name for name in layers)
    assert {"transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out"} <= layers.keys()
    assert model.decisions["transformer"].endswith(f"; {len(layers)} layers")
    expected = picture(DiffusionPipeline.from_pretrained(flux_folder))
    assert 0 < distance(picture(model.pipeline), expected) < (0.05 if "fp8" in quantization else 0.02)


def test_layers_can_be_left_out(flux_folder: Path) -> None:
    names = ("attn.to_", "proj_mlp")
    model = loaded(flux_folder, quantization="int8", quantization_ignored_layers=names)
    layers = [n for n, m in model.pipeline.transformer.named_modules() if isinstance(m, QuantizedLinear)]
    assert layers
    assert not [name for name in layers if any(part in name for part in names)]
    message = failure(flux_folder, quantization="int8", quantization_ignored_layers=("blocks",))
    assert message == "transformer (FluxTransformer2DModel) has no layer that int8 can be made of"


def test_checkpoint_of_another_kind_is_not_what_was_asked_for(
    flux_folder: Path, tensors: Named, tmp_path: Path
) -> None:
    save_file(fp8(tensors, "rows")[0], tmp_path / "w.safetensors")
    path = tmp_path / "w.safetensors"
    message = failure(flux_folder, transformer_weights_path=path, quantization="int8")
    assert message == "quantization is 'int8', but the weights of transformer are fp8 (by tensors)"
    dynamic = loaded(flux_folder, transformer_weights_path=path, quantization="fp8_dynamic")
    layers = [m for m in dynamic.pipeline.transformer.modules() if isinstance(m, QuantizedLinear)]
    assert {layer.activations for layer in layers} == {"rows"}


def quantized_online(quantization: str) -> Callable[[Path, Named, Path], LoadedModel]:
    return lambda folder, _tensors, _made: loaded(folder, quantization=quantization)


def quantized_static(folder: Path, tensors: Named, made: Path) -> LoadedModel:
    save_file(with_input_scales(fp8(tensors, "tensors")[0], 0.02), made / "w.safetensors")
    return loaded(folder, transformer_weights_path=made / "w.safetensors")


def quantized_gguf(folder: Path, tensors: Named, made: Path) -> LoadedModel:
    return loaded(folder, transformer_weights_path=write_gguf(made / "w-Q4_0.gguf", tensors, "Q4_0"))


@pytest.mark.parametrize(
    "make",
    [*map(quantized_online, ONLINE), quantized_static, quantized_gguf],
    ids=[*ONLINE, "static", "gguf"],
)
def test_requests_share_forwards_of_quantized_models(
    flux_folder: Path, tensors: Named, tmp_path: Path, make: Callable[[Path, Named, Path], LoadedModel]
) -> None:
    pipeline = make(flux_folder, tensors, tmp_path).pipeline
    alone = run_together(pipeline, calls("flux", 3), merge=False).outputs
    report = run_together(pipeline, calls("flux", 3))
    assert (report.mode, report.largest_batch) == ("merge", 3)
    for ours, expected in zip(report.outputs, alone, strict=True):
        torch.testing.assert_close(ours.images, expected.images, rtol=1e-4, atol=1e-4)


def test_what_mixes_rows_shares_no_forward(flux_folder: Path) -> None:
    pipeline = loaded(flux_folder).pipeline
    pipeline.transformer.sgld_mixes_rows = "LLM.int8 scales activations by the whole batch"
    report = run_together(pipeline, calls("flux", 2))
    assert report.mode == "interleave"
