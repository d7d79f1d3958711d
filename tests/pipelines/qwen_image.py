"""Qwen-Image."""

from typing import Any

import diffusers
import transformers

from pipelines.entry import Entry
from pipelines.parts import VOCABULARY, tokenizer


def qwen_image() -> Any:
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(VOCABULARY),
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1000000.0},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=1, vision_end_token_id=1
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    decoder = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    pipeline = diffusers.QwenImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), decoder.eval(), encoder, tokenizer(), transformer
    )
    pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx = "the of {}", 2
    return pipeline


PIPELINES = {
    "qwen_image": Entry(
        qwen_image,
        {"height": 32, "width": 32, "negative_prompt": "a dog on the hill", "true_cfg_scale": 2.0},
        guidance="true_cfg_scale",
    ),
}
