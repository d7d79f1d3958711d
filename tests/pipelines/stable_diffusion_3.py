"""Stable Diffusion 3."""

from functools import partial
from typing import Any

import diffusers

from pipelines.entry import Entry
from pipelines.parts import clip, image, t5, tokenizer, vae


def sd3(pipeline: str = "StableDiffusion3Pipeline") -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    encoders = clip(has_projection=True), tokenizer(), clip(has_projection=True), tokenizer(), t5(), tokenizer()
    return getattr(diffusers, pipeline)(transformer, scheduler, vae(4, shift_factor=0.06), *encoders)


_KWARGS = {"height": 32, "width": 32, "max_sequence_length": 16, "guidance_scale": 5.0}

PIPELINES = {
    "sd3": Entry(sd3, _KWARGS),
    "sd3_img2img": Entry(
        partial(sd3, "StableDiffusion3Img2ImgPipeline"), _KWARGS | {"strength": 0.9}, "image to image", inputs=image
    ),
}
