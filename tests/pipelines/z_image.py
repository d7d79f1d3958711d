"""Z-Image."""

from typing import Any

import diffusers
import torch
import transformers

from pipelines.entry import Entry
from pipelines.parts import VOCABULARY, tokenizer, vae


def z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    # Padding rows are trained from an uninitialised tensor.
    for parameter in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(parameter)
    config = transformers.Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(VOCABULARY),
    )
    return diffusers.ZImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(),
        vae(16, scaling_factor=0.36, shift_factor=0.1),
        transformers.Qwen3Model(config).eval(),
        tokenizer(),
        transformer,
    )


PIPELINES = {"z_image": Entry(z_image, {"height": 32, "width": 32, "guidance_scale": 3.0, "max_sequence_length": 16})}
