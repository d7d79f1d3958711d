"""Families of one pipeline each that make videos."""

from typing import Any

import diffusers

from pipelines.cogvideox import cogvideox
from pipelines.entry import Entry, Kwargs
from pipelines.parts import image, redrawn, t5, tokenizer, vae


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


def cogvideox_image_to_video() -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    own = {"transformer": transformer, "scheduler": diffusers.CogVideoXDDIMScheduler()}
    return diffusers.CogVideoXImageToVideoPipeline(**cogvideox().components | own)


def allegro() -> Any:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=32,
    )
    decoder = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
    )
    # It decodes in tiles only.
    decoder.enable_tiling()
    return diffusers.AllegroPipeline(tokenizer(), t5(), decoder.eval(), transformer, diffusers.DDIMScheduler())


def latte() -> Any:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=2,
    )
    redrawn(transformer, "proj_out.weight", 0.1)
    return diffusers.LattePipeline(tokenizer(), t5(), vae(), transformer.eval(), diffusers.DDIMScheduler())


_SIZE: Kwargs = {"height": 16, "width": 16, "max_sequence_length": 16, "negative_prompt": "a dog on the hill"}


PIPELINES = {
    "cogvideox_image_to_video": Entry(
        cogvideox_image_to_video,
        _SIZE | {"num_frames": 8},
        kind="image to video",
        second={"height": 32, "width": 16},
        inputs=image,
    ),
    "allegro": Entry(
        allegro,
        _SIZE | {"num_frames": 8, "clean_caption": False},
        kind="text to video",
        second={"height": 32, "width": 16},
    ),
    "latte": Entry(
        latte,
        {"height": 16, "width": 16, "video_length": 2, "clean_caption": False, "negative_prompt": "a dog on the hill"},
        kind="text to video",
    ),
    "mochi": Entry(mochi, _SIZE | {"num_frames": 7}, kind="text to video", second={"height": 32, "width": 16}),
}
