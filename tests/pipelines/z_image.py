"""Z-Image."""

from functools import partial
from typing import Any

import diffusers
import torch

from pipelines.entry import Entry
from pipelines.parts import image, qwen3, tokenizer, vae


def z_image(pipeline: str = "ZImagePipeline") -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    # Padding rows are trained from an uninitialised tensor.
    for parameter in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(parameter)
    return getattr(diffusers, pipeline)(
        diffusers.FlowMatchEulerDiscreteScheduler(),
        vae(16, scaling_factor=0.36, shift_factor=0.1),
        qwen3(),
        tokenizer(),
        transformer,
    )


_KWARGS = {"height": 32, "width": 32, "guidance_scale": 3.0, "max_sequence_length": 16}

PIPELINES = {
    "z_image": Entry(z_image, _KWARGS),
    "z_image_img2img": Entry(
        partial(z_image, "ZImageImg2ImgPipeline"), _KWARGS | {"strength": 0.9}, "image to image", inputs=image
    ),
}
