"""Lumina 2."""

from typing import Any

import diffusers
import transformers

from pipelines.entry import Entry
from pipelines.parts import VOCABULARY, tokenizer, vae


def lumina2() -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        cap_feat_dim=16,
    )
    config = transformers.Gemma2Config(
        vocab_size=len(VOCABULARY),
        head_dim=4,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=2,
    )
    return diffusers.Lumina2Pipeline(
        transformer,
        diffusers.FlowMatchEulerDiscreteScheduler(),
        vae(4, shift_factor=0.1),
        transformers.Gemma2Model(config).eval(),
        tokenizer(),
    )


PIPELINES = {
    "lumina2": Entry(
        lumina2, {"height": 32, "width": 32, "max_sequence_length": 16, "system_prompt": "a", "guidance_scale": 3.0}
    )
}
