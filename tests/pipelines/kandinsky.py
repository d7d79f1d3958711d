"""Kandinsky 2.2: two pipelines in one."""

from typing import Any

import diffusers
import torch
import transformers

from pipelines.entry import Entry
from pipelines.parts import clip, tokenizer


def _decoder() -> dict[str, Any]:
    unet = diffusers.UNet2DConditionModel(
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(8, 16),
        layers_per_block=1,
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
    )
    movq = diffusers.VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    # A trained one makes pixels near 1; this one would make them near 20, and rounding errors with them.
    torch.nn.init.normal_(movq.decoder.conv_out.weight, std=0.002)
    return {
        "unet": unet,
        "movq": movq.eval(),
        "scheduler": diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.004, clip_sample=False),
    }


def _prior() -> dict[str, Any]:
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=12, embedding_dim=32, num_embeddings=16, num_layers=1
    )
    # What a trained one has: else its embeddings are zeros.
    torch.nn.init.ones_(prior.clip_std)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=32,
        intermediate_size=16,
        patch_size=16,
    )
    return {
        "prior_prior": prior.eval(),
        "prior_image_encoder": transformers.CLIPVisionModelWithProjection(vision).eval(),
        "prior_text_encoder": clip(has_projection=True),
        "prior_tokenizer": tokenizer(),
        "prior_scheduler": diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
        "prior_image_processor": transformers.CLIPImageProcessor(crop_size=32, size=32),
    }


def kandinsky() -> Any:
    return diffusers.KandinskyV22CombinedPipeline(**_decoder(), **_prior())


PIPELINES = {
    "kandinsky": Entry(kandinsky, {"height": 32, "width": 32, "prior_num_inference_steps": 3, "guidance_scale": 3.0})
}
