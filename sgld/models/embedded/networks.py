"""The two embedded pipelines: their sizes, their untrained parts, and how they are saved."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

HEADS, HEAD_DIM, NUM_LAYERS = 6, 32, 10
WIDTH = HEADS * HEAD_DIM
IMAGE_CHANNELS, VIDEO_CHANNELS = 8, 12
IMAGE_DEFAULTS = {
    "num_inference_steps": 12,
    "guidance_scale": 2.5,
    "height": 256,
    "width": 256,
    # The captions are clean, and the cleaning needs a package that isn't a dependency.
    "clean_caption": False,
}
VIDEO_DEFAULTS = {
    "num_inference_steps": 12,
    "guidance_scale": 3.0,
    "height": 128,
    "width": 192,
    "num_frames": 17,
    "fps": 8,
}
DEFAULTS_FILE = "sgld_defaults.json"
# T5's buckets of the relative positions 1, 2, -1 and -2.
NEIGHBOUR_BUCKETS = (17, 18, 1, 2)
TextEncoder = TypeVar("TextEncoder", T5EncoderModel, UMT5EncoderModel)


def image_autoencoder() -> AutoencoderKL:
    """Pictures to latents of 8 channels, an eighth of the size; 2.1 M parameters."""
    return AutoencoderKL(
        latent_channels=IMAGE_CHANNELS,
        block_out_channels=(24, 48, 96, 96),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=256,
        scaling_factor=1.0,
    )


def video_autoencoder() -> AutoencoderKLWan:
    """Clips to latents of 12 channels, an eighth of the size, a quarter of the frames; 2.6 M parameters."""
    return AutoencoderKLWan(
        base_dim=24,
        z_dim=VIDEO_CHANNELS,
        dim_mult=[1, 2, 3],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        # Squares of two by two pixels at the entrance: four times less work at full size.
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * VIDEO_CHANNELS,
        latents_std=[1.0] * VIDEO_CHANNELS,
    )


def _text_sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "d_model": WIDTH,
        "d_kv": HEAD_DIM,
        "d_ff": 2 * WIDTH,
        "num_layers": 2,
        "num_heads": HEADS,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def image_text_encoder(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    return look_at_neighbours(T5EncoderModel(T5Config(**_text_sizes(tokenizer))))


def video_text_encoder(tokenizer: PreTrainedTokenizerFast) -> UMT5EncoderModel:
    return look_at_neighbours(UMT5EncoderModel(UMT5Config(**_text_sizes(tokenizer))))


@torch.no_grad()
def look_at_neighbours(text: TextEncoder) -> TextEncoder:
    """Lets one head each start out with the next word, the one after it, and the two before.

    From T5's own start, where position hardly counts, a short training finds no order of words: after 12,000 steps the
    colours of shape and background were swapped in half of the pictures.
    """
    for block in text.encoder.block:
        attention = block.layer[0].SelfAttention
        if attention.has_relative_attention_bias:
            bias = attention.relative_attention_bias.weight
            for head, bucket in enumerate(NEIGHBOUR_BUCKETS):
                bias[:, head] = 0.0
                bias[bucket, head] = 9.0
    return text


def image_denoiser() -> PixArtTransformer2DModel:
    """Predicts the velocity (noise minus data) of 32x32 latents in tokens of two by two; 6.3 M parameters."""
    return PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=IMAGE_CHANNELS,
        out_channels=IMAGE_CHANNELS,
        num_layers=NUM_LAYERS,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        # At 32 the pipeline chooses the nearest of its sizes of about 256x256 pixels.
        sample_size=32,
        patch_size=2,
        use_additional_conditions=False,
        interpolation_scale=1,
    )


def video_denoiser() -> WanTransformer3DModel:
    """Predicts the velocity of latents in tokens of one frame by two by two; 6.3 M parameters."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=VIDEO_CHANNELS,
        out_channels=VIDEO_CHANNELS,
        text_dim=WIDTH,
        freq_dim=256,
        ffn_dim=4 * WIDTH,
        num_layers=NUM_LAYERS,
    )


def image_pipeline(
    vae: AutoencoderKL, text: T5EncoderModel, denoiser: PixArtTransformer2DModel, tokenizer: PreTrainedTokenizerFast
) -> PixArtSigmaPipeline:
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0, solver_order=2
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=text, vae=vae, transformer=denoiser, scheduler=scheduler
    )


def video_pipeline(
    vae: AutoencoderKLWan, text: UMT5EncoderModel, denoiser: WanTransformer3DModel, tokenizer: PreTrainedTokenizerFast
) -> WanPipeline:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    )
    return WanPipeline(tokenizer=tokenizer, text_encoder=text, vae=vae, transformer=denoiser, scheduler=scheduler)


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, defaults: Mapping[str, float]) -> None:
    """Writes the pipeline with weights in half precision, and the sampling params that suit it beside it."""
    pipeline.to(torch.float16).save_pretrained(folder)
    (folder / DEFAULTS_FILE).write_text(json.dumps(defaults, indent=2) + "\n")
