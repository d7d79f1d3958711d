"""Modular pipelines, with the components of others."""

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers

from pipelines.entry import Entry, Kwargs
from pipelines.flux import flux
from pipelines.parts import image
from pipelines.qwen_image import qwen_image
from pipelines.stable_diffusion_xl import sdxl
from pipelines.wan import wan
from pipelines.z_image import z_image


def _modular(blocks: str, other: Callable[[], Any]) -> Any:
    pipeline = getattr(diffusers, blocks)().init_pipeline()
    expected = pipeline.components
    pipeline.update_components(**{name: model for name, model in other().components.items() if name in expected})
    return pipeline


def _with_skipped_layers() -> Any:
    pipeline = _modular("WanBlocks", wan)
    skipped = diffusers.hooks.LayerSkipConfig(
        indices=[0], fqn="blocks", skip_attention=True, skip_ff=True, skip_attention_scores=False
    )
    guider = diffusers.SkipLayerGuidance(
        skip_layer_config=skipped, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0
    )
    pipeline.update_components(guider=guider)
    return pipeline


_PICTURE: Kwargs = {"height": 32, "width": 32, "max_sequence_length": 16, "output": "images", "output_type": "pt"}
_VIDEO: Kwargs = {
    "height": 16,
    "width": 16,
    "num_frames": 9,
    "max_sequence_length": 16,
    "output": "videos",
    "output_type": "pt",
}

PIPELINES = {
    "modular_flux": Entry(partial(_modular, "FluxAutoBlocks", flux), _PICTURE, kind="text to image, modular"),
    "modular_flux_image_to_image": Entry(
        partial(_modular, "FluxAutoBlocks", flux),
        _PICTURE | {"strength": 0.8},
        kind="image to image, modular",
        inputs=image,
        variant="from a picture",
    ),
    "modular_qwen_image": Entry(
        partial(_modular, "QwenImageAutoBlocks", qwen_image), _PICTURE, kind="text to image, modular", guidance=None
    ),
    "modular_sdxl": Entry(
        partial(_modular, "StableDiffusionXLAutoBlocks", sdxl),
        {n: v for n, v in _PICTURE.items() if n != "max_sequence_length"},
        kind="text to image, modular",
        guidance=None,
    ),
    "modular_wan": Entry(
        partial(_modular, "WanBlocks", wan),
        _VIDEO,
        kind="text to video, modular",
        guidance=None,
        second={"height": 32, "width": 16},
    ),
    "modular_wan_skipped_layers": Entry(
        _with_skipped_layers,
        _VIDEO,
        kind="text to video, modular",
        guidance=None,
        second={"height": 32, "width": 16},
        variant="skip-layer guidance",
        merges=False,
        because="its guider hooks blocks of the denoiser: exclusive",
    ),
    "modular_z_image": Entry(
        partial(_modular, "ZImageAutoBlocks", z_image), _PICTURE, kind="text to image, modular", guidance=None
    ),
}
