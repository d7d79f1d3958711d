"""Models of which each rank reads its parts: together they compute what the whole model does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from pipelines.flux import SIZES as FLUX_SIZES
from pipelines.language import gemma_2, llama, qwen_2_5, qwen_3
from pipelines.ltx_variants import gemma_3
from pipelines.parts import clip, t5
from safetensors.torch import load_file, save_file

from models.teams import each, teams
from sgld.errors import ModelError
from sgld.models.sources import ComponentSource
from sgld.models.tensor_files import load_parts, weight_files
from sgld.models.tensor_layers import sizes

IDS = torch.tensor([[1, 2, 5, 3, 4, 0, 0], [3, 1, 0, 2, 7, 8, 6]])
TEXT = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])}


def umt5() -> Any:
    config = transformers.UMT5Config(
        vocab_size=23, d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return transformers.UMT5EncoderModel(config).eval()


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(in_channels=4, out_channels=4, **FLUX_SIZES).eval()


def of_flux() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 6, 4),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.0]),
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else ()
    return [tensor for item in items for tensor in tensors(item)]


@pytest.mark.parametrize(
    ("build", "most", "size"),
    [
        (t5, 0.52, 2),
        (t5, 0.29, 4),
        (umt5, 0.52, 2),
        # Its positions and its projection are whole.
        (lambda: clip(has_projection=True), 0.57, 2),
        (clip, 0.54, 2),
        (llama, 0.53, 2),
        (gemma_2, 0.53, 2),
        # Its eyes are whole, whose layers have the same names; its files have the names of older ones.
        (gemma_3, 0.9, 2),
        (qwen_3, 0.53, 2),
        # Its eyes are whole, which are large here.
        (qwen_2_5, 0.93, 2),
        # What modulates its layers is whole.
        (flux, 0.77, 2),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)).strip("<>"),
)
def test_parts_compute_what_the_whole_model_does(
    build: Callable[[], Any], most: float, size: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path)
    source = ComponentSource(str(tmp_path))
    parts = [load_parts(type(model), source, team, torch.float32) for team in teams(size)]
    kwargs = of_flux() if isinstance(model, diffusers.ModelMixin) else TEXT | {"output_hidden_states": True}
    with torch.no_grad():
        expected = tensors(model(**kwargs))
    for found in each([lambda part=part: tensors(part(**kwargs)) for part in parts]):  # type: ignore[misc]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for part in parts:
        here, whole = sizes(part)
        assert whole == sum(weight.nbytes for weight in model.parameters())
        assert here <= most * whole
        assert type(part) is type(model)
        assert not part.training


def test_weights_are_found_by_what_older_files_call_them(tmp_path: Path) -> None:
    model = clip()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(file).items()}, file)
    [part, _] = [load_parts(type(model), ComponentSource(str(tmp_path)), team, torch.float16) for team in teams(2)]
    whole, here = dict(model.named_parameters()), dict(part.named_parameters())
    assert whole.keys() == here.keys()
    for name, weight in here.items():
        torch.testing.assert_close(weight, whole[name][tuple(map(slice, weight.shape))].half())


def test_shards_of_a_variant_are_found(tmp_path: Path) -> None:
    model = t5()
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="10kB")
    source = ComponentSource(str(tmp_path), variant="fp16")
    assert len(weight_files(type(model), source)) > 1
    assert sizes(load_parts(type(model), source, teams(2)[1], torch.float16))[0] > 0


def test_files_that_ranks_cannot_read_parts_of_are_refused(tmp_path: Path) -> None:
    t5().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no model\.safetensors, and only of safetensors ranks can read parts"):
        weight_files(transformers.T5EncoderModel, ComponentSource(str(tmp_path)))


def test_file_of_another_model_is_refused(tmp_path: Path) -> None:
    model = flux()
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 2}))
    with pytest.raises(ModelError, match=r"the weights have no transformer_blocks\.1\."):
        load_parts(type(model), ComponentSource(str(tmp_path)), teams(2)[0], torch.float32)
