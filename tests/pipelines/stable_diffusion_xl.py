"""Stable Diffusion XL."""

from typing import Any

import diffusers

from pipelines.entry import Entry
from pipelines.parts import clip, tokenizer, vae


def sdxl() -> Any:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=1,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        cross_attention_dim=64,
        norm_num_groups=4,
        sample_size=16,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae(), clip(), clip(has_projection=True), tokenizer(), tokenizer(), unet, diffusers.EulerDiscreteScheduler()
    )


PIPELINES = {"sdxl": Entry(sdxl, {"height": 32, "width": 32, "guidance_scale": 5.0})}
