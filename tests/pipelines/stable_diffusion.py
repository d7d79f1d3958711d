"""Stable Diffusion 1 and 2, and what is made of their components."""

from functools import partial
from typing import Any

import diffusers
import torch

from pipelines.entry import Entry, Kwargs
from pipelines.parts import (
    clip,
    controlnet_of,
    image,
    image_and_mask,
    image_embeds,
    ip_adapter,
    picture,
    tokenizer,
    vae,
)


def unet(**config: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=4,
        sample_size=16,
        **{"out_channels": 4} | config,
    )


def pndm() -> diffusers.PNDMScheduler:
    return diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)


def stable_diffusion(
    pipeline: str = "StableDiffusionPipeline", scheduler: Any = None, in_channels: int = 4, **components: Any
) -> Any:
    parts: dict[str, Any] = {
        "vae": vae(),
        "text_encoder": clip(),
        "tokenizer": tokenizer(),
        "unet": unet(in_channels=in_channels),
        "scheduler": scheduler or pndm(),
        "safety_checker": None,
        "feature_extractor": None,
    }
    return getattr(diffusers, pipeline)(**parts | components)


def with_controlnet() -> Any:
    denoiser = unet()
    return stable_diffusion("StableDiffusionControlNetPipeline", unet=denoiser, controlnet=controlnet_of(denoiser))


def with_ip_adapter() -> Any:
    pipeline = stable_diffusion()
    ip_adapter(pipeline.unet)
    return pipeline


def pag() -> Any:
    """Perturbed attention guidance: its `__call__` swaps attention processors of the denoiser."""
    return stable_diffusion("StableDiffusionPAGPipeline", diffusers.DDIMScheduler(), pag_applied_layers=["mid"])


def lcm() -> Any:
    return stable_diffusion("LatentConsistencyModelPipeline", diffusers.LCMScheduler(), unet=unet(time_cond_proj_dim=8))


def upscale() -> Any:
    return diffusers.StableDiffusionUpscalePipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=unet(in_channels=7, num_class_embeds=100),
        low_res_scheduler=diffusers.DDPMScheduler(),
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"),
    )


def depth2img() -> Any:
    return diffusers.StableDiffusionDepth2ImgPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=unet(in_channels=5),
        scheduler=pndm(),
        depth_estimator=None,
        feature_extractor=None,
    )


def _small_picture(index: int, _kwargs: Kwargs) -> Kwargs:
    return {"image": picture(index, {"height": 16, "width": 16})}


def _picture_and_depth(index: int, kwargs: Kwargs) -> Kwargs:
    depth = torch.linspace(0, 1 + index, 16 * 16).reshape(1, 16, 16)
    return _small_picture(index, kwargs) | {"depth_map": depth}


_KWARGS = {"height": 32, "width": 32, "guidance_scale": 5.0}
_SWAPS = "swaps attention processors while it runs, so each request runs alone"

PIPELINES = {
    "sd": Entry(stable_diffusion, _KWARGS),
    "sd_img2img": Entry(
        partial(stable_diffusion, "StableDiffusionImg2ImgPipeline"),
        _KWARGS | {"strength": 0.9},
        "image to image",
        inputs=image,
    ),
    "sd_inpaint": Entry(
        partial(stable_diffusion, "StableDiffusionInpaintPipeline", in_channels=9),
        _KWARGS,
        "inpainting",
        inputs=image_and_mask,
    ),
    "sd_controlnet": Entry(with_controlnet, _KWARGS, "ControlNet", inputs=image),
    "sd_ip_adapter": Entry(with_ip_adapter, _KWARGS, "image prompt", inputs=image_embeds, variant="IP-Adapter"),
    "sd_pag": Entry(pag, _KWARGS | {"pag_scale": 2.0}, merges=False, because=_SWAPS),
    "sd_upscale": Entry(upscale, {"guidance_scale": 5.0}, "upscaling", inputs=_small_picture, second={}),
    "sd_depth2img": Entry(depth2img, {"guidance_scale": 5.0}, "depth to image", inputs=_picture_and_depth, second={}),
    "lcm": Entry(lcm, _KWARGS),
}
