"""Adapters of all formats are read as diffusers and peft read them."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import build
from safetensors.torch import load_file, save_file

from models.adapters import Matrices, as_diffusers, as_kohya, as_peft, matrices
from sgld.errors import InvalidRequest
from sgld.models.lora import Adapter, adaptable, read

Write = Callable[[Path, Matrices], Path]


def changes(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The change of each layer's weight, under its full name."""
    return {
        f"{component}.{name}": layer.up.float() @ layer.down.float()
        for component, layers in adapter.layers.items()
        for name, layer in layers.items()
    }


def changes_of_diffusers(pipeline: Any, path: Path) -> dict[str, torch.Tensor]:
    """The same, of what diffusers and peft make of the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.load_lora_weights(str(path), adapter_name="a")
    found = {}
    for component in adaptable(pipeline).targets:
        for name, module in getattr(pipeline, component).named_modules():
            if hasattr(module, "lora_A") and "a" in module.lora_A:
                down, up = module.lora_A["a"].weight, module.lora_B["a"].weight
                found[f"{component}.{name}"] = module.scaling["a"] * up.flatten(1) @ down.flatten(1)
    return found


def kohya(path: Path, made: Matrices) -> Path:
    return as_kohya(path, made, alpha=2.0)


def comfy(path: Path, made: Matrices) -> Path:
    """As other trainers write adapters of a transformer: its original names, and alphas."""
    as_diffusers(path, made)
    tensors = load_file(path)
    renamed = {f"diffusion_model.{name.partition('.')[2]}": tensor for name, tensor in tensors.items()}
    alphas = {name.replace("lora_A.weight", "alpha"): torch.tensor(1.0) for name in renamed if "lora_A" in name}
    save_file(renamed | alphas, path)
    return path


def kohya_of_flux(path: Path, made: Matrices) -> Path:
    """Kohya's names are those of the model's authors."""
    names = {
        "transformer.transformer_blocks.0.ff.net.0.proj": "transformer.double_blocks.0.img_mlp.0",
        "transformer.transformer_blocks.0.ff.net.2": "transformer.double_blocks.0.img_mlp.2",
        "transformer.transformer_blocks.0.attn.to_out.0": "transformer.double_blocks.0.img_attn.proj",
        "text_encoder.encoder.layers.0.mlp.fc1": "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    }
    return kohya(path, {new: made[old] for old, new in names.items()})


def with_header(path: Path, made: Matrices) -> Path:
    config = {"r": 4, "lora_alpha": 6, "alpha_pattern": {"to_q": 1}, "target_modules": ["to_q"]}
    return as_diffusers(path, made, {f"transformer.{name}": value for name, value in config.items()})


def is_of_attention(name: str) -> bool:
    return name.rpartition(".")[2] in ("to_q", "to_k", "to_v")


CASES: dict[str, tuple[str, Write, Callable[[str], bool]]] = {
    "flux": ("flux", as_diffusers, lambda name: True),
    "flux, alphas in its header": ("flux", with_header, is_of_attention),
    "flux, kohya": ("flux", kohya_of_flux, lambda name: True),
    "sdxl": ("sdxl", as_diffusers, lambda name: True),
    "sdxl, kohya": ("sdxl", kohya, lambda name: "proj" in name or "to_" in name or "mlp" in name),
    "sd, kohya": ("sd", kohya, lambda name: "to_" in name or "mlp" in name),
    "wan": ("wan", as_diffusers, is_of_attention),
    "qwen_image, kohya": ("qwen_image", kohya, is_of_attention),
    "qwen_image, comfy": ("qwen_image", comfy, is_of_attention),
    "z_image, kohya": ("z_image", kohya, is_of_attention),
}


@pytest.mark.parametrize("case", CASES)
def test_formats_are_read_as_diffusers_reads_them(case: str, tmp_path: Path) -> None:
    name, write, only = CASES[case]
    pipeline, _ = build(name)
    path = write(tmp_path / "a.safetensors", matrices(pipeline, 0, only=only))

    found = changes(read(str(path), adaptable(pipeline)))

    expected = changes_of_diffusers(pipeline, path)
    assert expected.keys() == found.keys()
    assert len(found) > 3
    for layer, change in expected.items():
        torch.testing.assert_close(found[layer], change, rtol=1e-4, atol=1e-6)


def test_convolutions_are_read(tmp_path: Path) -> None:
    pipeline, _ = build("sdxl")
    kernel = torch.randn(4, pipeline.unet.conv_in.in_channels, 3, 3)
    up = torch.randn(pipeline.unet.conv_in.out_channels, 4, 1, 1)
    made = {"unet.conv_in": (kernel, up)}

    found = changes(read(str(as_diffusers(tmp_path / "a.safetensors", made)), adaptable(pipeline)))

    torch.testing.assert_close(found["unet.conv_in"], up.flatten(1) @ kernel.flatten(1))


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"blocks.0.attn1.to_q": 1}}, 0.25),
        ({}, 1.0),
    ],
)
def test_folders_of_peft_have_their_scale_in_a_config(config: dict[str, Any], scale: float, tmp_path: Path) -> None:
    pipeline, _ = build("wan")
    name = "transformer.blocks.0.attn1.to_q"
    made = matrices(pipeline, 0, only=lambda layer: layer == name)

    found = changes(read(str(as_peft(tmp_path / "peft", made, **config)), adaptable(pipeline)))

    down, up = made[name]
    torch.testing.assert_close(found, {name: scale * up @ down})


def test_alpha_counts_where_the_file_does_not_say(tmp_path: Path) -> None:
    pipeline, _ = build("wan")
    made = matrices(pipeline, 0, only=is_of_attention)
    model = adaptable(pipeline)

    silent = read(str(as_diffusers(tmp_path / "silent.safetensors", made)), model, alpha=2.0)
    said = read(str(kohya_of_peft(tmp_path / "said.safetensors", made)), model, alpha=2.0)

    name = next(iter(made))
    torch.testing.assert_close(changes(silent)[name], 0.5 * made[name][1] @ made[name][0])
    torch.testing.assert_close(changes(said)[name], 0.25 * made[name][1] @ made[name][0])


def kohya_of_peft(path: Path, made: Matrices) -> Path:
    """Names of peft, with alphas."""
    as_diffusers(path, made)
    alphas = {f"{name}.alpha": torch.tensor(1.0) for name in made}
    save_file(load_file(path) | alphas, path)
    return path


def test_files_of_one_transformer_are_for_both_or_for_the_target(tmp_path: Path) -> None:
    pipeline, _ = build("wan")
    adapter = read(str(as_diffusers(tmp_path / "a.safetensors", matrices(pipeline, 0))), adaptable(pipeline))

    assert adapter.of("transformer_2", "all") == adapter.of("transformer_2", "transformer_2") != {}
    assert adapter.of("transformer", "transformer_2") == {} == adapter.of("text_encoder", "all")


def problem_of(path: Path | str, pipeline: Any, **options: Any) -> str:
    """What is said of an adapter that can't be used: one line that names it."""
    with pytest.raises(InvalidRequest) as caught:
        read(str(path), adaptable(pipeline, **options))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.param == "lora"
    return str(caught.value)


@pytest.fixture(scope="module")
def wan() -> Any:
    return build("wan")[0]


def test_layers_that_fit_nothing_are_an_error_unless_that_is_allowed(wan: Any, tmp_path: Path) -> None:
    made = matrices(wan, 0, only=is_of_attention)
    made["transformer.blocks.7.attn1.to_q"] = made["transformer.blocks.0.attn1.to_q"]
    path = as_diffusers(tmp_path / "a.safetensors", made)

    assert "1 of its layers match nothing (transformer.blocks.7.attn1.to_q)" in problem_of(path, wan)
    adapter = read(str(path), adaptable(wan, refuses_unmatched=False))
    assert (adapter.num_unmatched, len(adapter.layers["transformer"])) == (1, len(made) - 1)


def test_other_shapes_are_named(wan: Any, tmp_path: Path) -> None:
    made = {"transformer.blocks.0.attn1.to_q": (torch.randn(4, 3), torch.randn(5, 4))}
    path = as_diffusers(tmp_path / "a.safetensors", made)

    assert "(5, 4) by (4, 3) in a layer of" in problem_of(path, wan)
    assert "is it for another model?" in problem_of(path, wan, refuses_unmatched=False)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformer.blocks.0.attn1.to_q.lora_magnitude_vector", "DoRA"),
        ("lora_unet_blocks_0_attn1_to_q.hada_w1_a", "LoHa"),
        ("lora_unet_blocks_0_attn1_to_q.lokr_w1", "LoKr"),
    ],
)
def test_other_kinds_are_named(name: str, kind: str, wan: Any, tmp_path: Path) -> None:
    save_file({name: torch.randn(4, 4)}, tmp_path / "a.safetensors")

    assert f"it is {kind}" in problem_of(tmp_path / "a.safetensors", wan)


def test_what_is_no_adapter_is_an_error(wan: Any, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "a.bin").write_text("")
    save_file({"weight": torch.randn(4, 4)}, tmp_path / "other.safetensors")

    assert "it isn't a safetensors file" in problem_of(tmp_path / "text.safetensors", wan)
    assert "only .safetensors files are read" in problem_of(tmp_path / "a.bin", wan)
    assert "is it for another model?" in problem_of(tmp_path / "other.safetensors", wan)
    assert "there is no such file" in problem_of(tmp_path / "missing.safetensors", wan)


def test_what_a_converter_does_not_know_is_shown_as_far_as_it_says(tmp_path: Path) -> None:
    path = kohya(tmp_path / "a.safetensors", {"transformer.nothing": (torch.randn(4, 3), torch.randn(5, 4))})

    assert "FluxPipeline can't read it: ValueError: Incompatible keys detected: lora_unet_nothing" in problem_of(
        path, build("flux")[0]
    )


def test_pipelines_without_adapters_say_so(tmp_path: Path) -> None:
    pipeline, _ = build("pixart")
    path = as_diffusers(tmp_path / "a.safetensors", {"transformer.x": (torch.randn(4, 3), torch.randn(5, 4))})

    assert f"{type(pipeline).__name__} takes no LoRA adapters" in problem_of(path, pipeline)


def test_identity_changes_with_the_file(wan: Any, tmp_path: Path) -> None:
    path = as_diffusers(tmp_path / "a.safetensors", matrices(wan, 0, only=is_of_attention))
    first = read(str(path), adaptable(wan)).id
    as_diffusers(path, matrices(wan, 1, rank=8, only=is_of_attention))

    assert read(str(path), adaptable(wan)).id != first
