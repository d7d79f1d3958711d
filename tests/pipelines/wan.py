"""Wan."""

from typing import Any

import diffusers
import transformers

from pipelines.entry import Entry
from pipelines.parts import image, t5, tokenizer, wan_vae


def _wan_transformer(**config: Any) -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        **config,
    )


def wan() -> Any:
    return diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=_wan_transformer(in_channels=16, out_channels=16),
    )


def wan_i2v() -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=4,
        projection_dim=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=16,
        patch_size=1,
    )
    return diffusers.WanImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=wan_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        image_processor=transformers.CLIPImageProcessor(crop_size=32, size=32),
        image_encoder=transformers.CLIPVisionModel(vision).eval(),
        transformer=_wan_transformer(in_channels=36, out_channels=16, image_dim=4),
    )


PIPELINES = {
    "wan": Entry(
        wan,
        {"height": 16, "width": 16, "num_frames": 9, "max_sequence_length": 16},
        kind="text to video",
        second={"height": 32, "width": 16},
    ),
    "wan_i2v": Entry(
        wan_i2v,
        {"height": 16, "width": 16, "num_frames": 9},
        kind="image to video",
        second={"height": 32, "width": 16},
        inputs=image,
    ),
}
