"""Stable Cascade: two pipelines in one."""

from typing import Any

import diffusers
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

from pipelines.entry import Entry
from pipelines.parts import clip, tokenizer


def _unet(channels: int, **config: Any) -> diffusers.StableCascadeUNet:
    return diffusers.StableCascadeUNet(
        in_channels=channels,
        out_channels=channels,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_pooled_in_channels=32,
        **config,
    ).eval()


def stable_cascade() -> Any:
    pixels = PaellaVQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=2)
    return diffusers.StableCascadeCombinedPipeline(
        tokenizer=tokenizer(),
        text_encoder=clip(has_projection=True),
        decoder=_unet(4, effnet_in_channels=16),
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        vqgan=pixels.eval(),
        prior_prior=_unet(16, clip_text_in_channels=32, clip_image_in_channels=32, switch_level=(False,)),
        prior_text_encoder=clip(has_projection=True),
        prior_tokenizer=tokenizer(),
        prior_scheduler=diffusers.DDPMWuerstchenScheduler(),
    )


PIPELINES = {
    "stable_cascade": Entry(
        stable_cascade,
        {
            "height": 128,
            "width": 128,
            "prior_num_inference_steps": 3,
            "prior_guidance_scale": 3.0,
            "decoder_guidance_scale": 2.0,
        },
        guidance="prior_guidance_scale",
    )
}
