"""Bria 3.2 and FIBO."""

from typing import Any

import diffusers
import transformers

from pipelines.entry import Entry, Kwargs
from pipelines.language import SIZES
from pipelines.parts import t5, tokenizer, vae

_TRANSFORMER: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": None,
    "axes_dims_rope": [0, 4, 4],
}


def bria() -> Any:
    transformer = diffusers.BriaTransformer2DModel(**_TRANSFORMER)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.BriaPipeline(transformer, scheduler, vae(), t5(), tokenizer())


def bria_fibo() -> Any:
    decoder = diffusers.AutoencoderKLWan(
        base_dim=3,
        decoder_base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        temperal_downsample=[False, True, True],
    )
    transformer = diffusers.BriaFiboTransformer2DModel(**_TRANSFORMER, text_encoder_dim=16)
    # The pipeline itself writes a token of this number where a prompt is empty.
    config = transformers.SmolLM3Config(**SIZES | {"vocab_size": 128001})
    encoder = transformers.SmolLM3ForCausalLM(config).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.BriaFiboPipeline(transformer, scheduler, decoder.eval(), encoder, tokenizer())


_SIZE: Kwargs = {"height": 32, "width": 32, "max_sequence_length": 16, "negative_prompt": "a dog on the hill"}

PIPELINES = {"bria": Entry(bria, _SIZE), "bria_fibo": Entry(bria_fibo, _SIZE, second={"height": 64, "width": 32})}
