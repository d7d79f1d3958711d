"""Flux."""

from functools import partial
from typing import Any

import diffusers

from pipelines.entry import Entry
from pipelines.parts import clip, control_image, image, image_and_mask, redrawn, t5, tokenizer, vae

SIZES: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 4, 8),
}


def flux(pipeline: str = "FluxPipeline", in_channels: int = 4, **components: Any) -> Any:
    return getattr(diffusers, pipeline)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(1, shift_factor=0.1),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
        transformer=diffusers.FluxTransformer2DModel(in_channels=in_channels, out_channels=4, **SIZES),
        **components,
    )


def flux_controlnet() -> Any:
    controlnet = diffusers.FluxControlNetModel(in_channels=4, **SIZES)
    redrawn(controlnet, "controlnet_", std=0.1)
    return flux("FluxControlNetPipeline", controlnet=controlnet)


_KWARGS = {"height": 16, "width": 16, "max_sequence_length": 16, "guidance_scale": 3.0}
_TRUE_CFG = _KWARGS | {"negative_prompt": "a dog on the hill", "true_cfg_scale": 2.0}

PIPELINES = {
    "flux": Entry(flux, _KWARGS),
    "flux_true_cfg": Entry(flux, _TRUE_CFG, guidance="true_cfg_scale", variant="true CFG"),
    "flux_img2img": Entry(
        partial(flux, "FluxImg2ImgPipeline"), _KWARGS | {"strength": 0.9}, "image to image", inputs=image
    ),
    "flux_inpaint": Entry(
        partial(flux, "FluxInpaintPipeline"), _KWARGS | {"strength": 0.9}, "inpainting", inputs=image_and_mask
    ),
    "flux_fill": Entry(
        partial(flux, "FluxFillPipeline", in_channels=4 + 4 + 16), _KWARGS, "inpainting", inputs=image_and_mask
    ),
    "flux_control": Entry(
        partial(flux, "FluxControlPipeline", in_channels=8), _KWARGS, "control image", inputs=control_image
    ),
    "flux_controlnet": Entry(flux_controlnet, _KWARGS, "ControlNet", inputs=control_image),
    "flux_kontext": Entry(
        partial(flux, "FluxKontextPipeline"),
        _KWARGS | {"max_area": 16 * 16, "_auto_resize": False},
        "editing",
        inputs=image,
    ),
}
