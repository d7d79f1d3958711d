"""Flux."""

from typing import Any

import diffusers

from pipelines.entry import Entry
from pipelines.parts import clip, t5, tokenizer, vae


def flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(),
        vae(1, shift_factor=0.1),
        clip(),
        tokenizer(),
        t5(),
        tokenizer(),
        transformer,
    )


PIPELINES = {"flux": Entry(flux, {"height": 16, "width": 16, "max_sequence_length": 16, "guidance_scale": 3.0})}
