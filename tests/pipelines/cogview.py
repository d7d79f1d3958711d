"""CogView3-Plus and CogView4."""

from typing import Any

import diffusers
import transformers

from pipelines.entry import Entry, Kwargs
from pipelines.language import SIZES
from pipelines.parts import t5, tokenizer, vae


def cogview_3_plus() -> Any:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=16,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    return diffusers.CogView3PlusPipeline(tokenizer(), t5(), vae(), transformer, scheduler)


def cogview_4() -> Any:
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    glm = transformers.GlmModel(transformers.GlmConfig(**SIZES)).eval()
    return diffusers.CogView4Pipeline(tokenizer(), glm, vae(), transformer, scheduler)


_SIZE: Kwargs = {"height": 16, "width": 16, "max_sequence_length": 16, "negative_prompt": "a dog on the hill"}

PIPELINES = {
    "cogview_3_plus": Entry(cogview_3_plus, _SIZE),
    "cogview_4": Entry(cogview_4, _SIZE, second={"height": 32, "width": 16}),
}
