"""Families of one pipeline each that make videos."""

from typing import Any

import diffusers

from pipelines.entry import Entry, Kwargs
from pipelines.parts import redrawn, t5, tokenizer


def mochi() -> Any:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    redrawn(transformer, "pos_frequencies")
    decoder = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.MochiPipeline(scheduler, decoder.eval(), t5(), tokenizer(), transformer)


_SIZE: Kwargs = {"height": 16, "width": 16, "max_sequence_length": 16, "negative_prompt": "a dog on the hill"}


PIPELINES = {
    "mochi": Entry(mochi, _SIZE | {"num_frames": 7}, kind="text to video", second={"height": 32, "width": 16}),
}
