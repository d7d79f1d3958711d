"""LTX-Video."""

from typing import Any

import diffusers

from pipelines.entry import Entry
from pipelines.parts import t5, tokenizer


def ltx() -> Any:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    decoder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    decoder.use_framewise_encoding = False
    decoder.use_framewise_decoding = False
    return diffusers.LTXPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), decoder.eval(), t5(), tokenizer(), transformer
    )


PIPELINES = {
    "ltx": Entry(
        ltx,
        {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16},
        kind="text to video",
        second={"height": 64, "width": 32},
    ),
}
