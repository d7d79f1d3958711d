"""CogVideoX."""

from typing import Any

import diffusers

from pipelines.entry import Entry
from pipelines.parts import t5, tokenizer


def cogvideox() -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=16,
    )
    blocks = {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
    }
    decoder = diffusers.AutoencoderKLCogVideoX(latent_channels=4, layers_per_block=1, norm_num_groups=2, **blocks)
    return diffusers.CogVideoXPipeline(
        tokenizer(), t5(), decoder.eval(), transformer, diffusers.CogVideoXDDIMScheduler()
    )


PIPELINES = {
    "cogvideox": Entry(
        cogvideox,
        {"height": 16, "width": 16, "num_frames": 8, "max_sequence_length": 16},
        kind="text to video",
        second={"height": 32, "width": 16},
    ),
}
