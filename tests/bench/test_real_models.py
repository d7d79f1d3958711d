from pathlib import Path

import diffusers
import pytest
import real_models
import torch
from real_models import MODELS

# Millions of parameters, of the models that the public configs belong to.
SIZES = {
    "sdxl": {"vae": 84, "text_encoder": 123, "text_encoder_2": 695, "unet": 2567},
    "flux": {"vae": 84, "text_encoder": 123, "text_encoder_2": 4762, "transformer": 11901},
    "qwen-image": {"vae": 127, "text_encoder": 8292, "transformer": 20430},
    "z-image": {"vae": 84, "text_encoder": 4022, "transformer": 6155},
    "wan": {"text_encoder": 5681, "vae": 127, "transformer": 1419},
    "sd3.5-medium": {
        "transformer": 2243,
        "vae": 84,
        "text_encoder": 124,
        "text_encoder_2": 695,
        "text_encoder_3": 4762,
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_size_of_the_real_ones(name: str) -> None:
    parts = {part: MODELS[name].parts[part].build("meta", is_tiny=False) for part in SIZES[name]}

    counted = {part: round(sum(p.numel() for p in module.parameters()) / 1e6) for part, module in parts.items()}

    assert counted == SIZES[name]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_what_plain_diffusers_loads(name: str, tmp_path: Path) -> None:
    made = real_models.make(name, tmp_path, is_tiny=True, device="cpu")

    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / name)

    assert made["model"] == name
    again = MODELS[name].build(is_tiny=True, device="cpu")
    for part, module in again.components.items():
        if isinstance(module, torch.nn.Module):
            expected, found = module.state_dict(), loaded.components[part].state_dict()
            assert found.keys() == expected.keys(), part
            assert all(torch.equal(found[key], value) for key, value in expected.items()), part
    assert real_models.look(name, loaded, is_tiny=True)


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_models, "_SHARD_BYTES", 20_000)

    real_models.make("wan", tmp_path, is_tiny=True, device="cpu")

    assert len(list((tmp_path / "wan" / "transformer").glob("*.safetensors"))) > 2
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "wan")
    expected = MODELS["wan"].build(is_tiny=True, device="cpu").transformer.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.transformer.state_dict().items())


def test_prompts_are_equally_long_and_all_different() -> None:
    tokenizer = MODELS["flux"].parts["tokenizer"].build("cpu", is_tiny=False)

    ids = [tuple(tokenizer(real_models.prompt(index)).input_ids) for index in range(1000)]

    assert len(set(ids)) == 1000
    assert {len(one) for one in ids} == {len(ids[0])}
    assert tokenizer.unk_token_id not in {token for one in ids for token in one}


def test_lost_values_are_an_error() -> None:
    pipeline = MODELS["flux"].build(is_tiny=True, device="cpu")
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.fill_(torch.inf)

    with pytest.raises(ValueError, match="another scale"):
        real_models.look("flux", pipeline, is_tiny=True)
