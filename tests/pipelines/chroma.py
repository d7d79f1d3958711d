"""Chroma."""

from functools import partial
from typing import Any

import diffusers

from pipelines.entry import Entry
from pipelines.parts import image, t5, tokenizer, vae


def chroma(pipeline: str = "ChromaPipeline") -> Any:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return getattr(diffusers, pipeline)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(1, shift_factor=0.1),
        text_encoder=t5(),
        tokenizer=tokenizer(),
        transformer=transformer,
    )


_KWARGS = {
    "height": 16,
    "width": 16,
    "max_sequence_length": 16,
    "guidance_scale": 3.0,
    "negative_prompt": "a dog on the hill",
}

PIPELINES = {
    "chroma": Entry(chroma, _KWARGS),
    "chroma_img2img": Entry(partial(chroma, "ChromaImg2ImgPipeline"), _KWARGS, "image to image", inputs=image),
}
