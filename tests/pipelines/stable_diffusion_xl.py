"""Stable Diffusion XL."""

from functools import partial
from typing import Any

import diffusers

from pipelines.entry import Entry
from pipelines.parts import clip, controlnet_of, image, image_and_mask, image_embeds, ip_adapter, tokenizer, vae


def _unet() -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=1,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        cross_attention_dim=64,
        norm_num_groups=4,
        sample_size=16,
    )


def sdxl(pipeline: str = "StableDiffusionXLPipeline", **components: Any) -> Any:
    parts: dict[str, Any] = {
        "vae": vae(),
        "text_encoder": clip(),
        "text_encoder_2": clip(has_projection=True),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "unet": _unet(),
        "scheduler": diffusers.EulerDiscreteScheduler(),
    }
    return getattr(diffusers, pipeline)(**parts | components)


def with_controlnet() -> Any:
    unet = _unet()
    return sdxl("StableDiffusionXLControlNetPipeline", unet=unet, controlnet=controlnet_of(unet))


def with_ip_adapter() -> Any:
    pipeline = sdxl()
    ip_adapter(pipeline.unet)
    return pipeline


_KWARGS = {"height": 32, "width": 32, "guidance_scale": 5.0}

PIPELINES = {
    "sdxl": Entry(sdxl, _KWARGS),
    "sdxl_img2img": Entry(
        partial(sdxl, "StableDiffusionXLImg2ImgPipeline"), _KWARGS | {"strength": 0.9}, "image to image", inputs=image
    ),
    "sdxl_inpaint": Entry(
        partial(sdxl, "StableDiffusionXLInpaintPipeline"), _KWARGS, "inpainting", inputs=image_and_mask
    ),
    "sdxl_controlnet": Entry(with_controlnet, _KWARGS, "ControlNet", inputs=image),
    "sdxl_ip_adapter": Entry(with_ip_adapter, _KWARGS, "image prompt", inputs=image_embeds, variant="IP-Adapter"),
    "sdxl_pag": Entry(
        partial(sdxl, "StableDiffusionXLPAGPipeline", pag_applied_layers=["mid"]),
        _KWARGS | {"pag_scale": 2.0},
        merges=False,
        because="swaps attention processors while it runs, so each request runs alone",
    ),
}
