"""Qwen-Image."""

import re
from functools import partial
from typing import Any

import diffusers
import transformers

from pipelines.entry import Entry
from pipelines.parts import VOCABULARY, control_image, image, image_and_mask, redrawn, tokenizer

_VISION_WORDS = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
_SIZES: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}


def _encoder() -> transformers.Qwen2_5_VLForConditionalGeneration:
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(VOCABULARY) + len(_VISION_WORDS),
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1000000.0},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    ids = {
        f"{name}_token_id": len(VOCABULARY) + index
        for index, name in enumerate(("vision_start", "image", "vision_end", "video"))
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def _vae(**config: Any) -> diffusers.AutoencoderKLQwenImage:
    return diffusers.AutoencoderKLQwenImage(z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4, **config).eval()


def qwen_image(pipeline: str = "QwenImagePipeline", **components: Any) -> Any:
    made = getattr(diffusers, pipeline)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_vae(base_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True]),
        text_encoder=_encoder(),
        tokenizer=tokenizer(),
        transformer=diffusers.QwenImageTransformer2DModel(**_SIZES),
        **components,
    )
    made.prompt_template_encode, made.prompt_template_encode_start_idx = "the of {}", 2
    return made


def qwen_image_controlnet() -> Any:
    controlnet = diffusers.QwenImageControlNetModel(**_SIZES)
    redrawn(controlnet, "controlnet_", std=0.1)
    return qwen_image("QwenImageControlNetPipeline", controlnet=controlnet)


class Processor:
    """Prompts with pictures in them. That of transformers needs torchvision, for videos."""

    def __init__(self, words: transformers.PreTrainedTokenizerFast) -> None:
        self._words = words
        self._pictures = transformers.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56)

    def __call__(self, text: list[str], images: Any, **options: Any) -> transformers.BatchFeature:
        seen = self._pictures(images=images, return_tensors="pt")
        sizes = iter(seen["image_grid_thw"].prod(-1) // self._pictures.merge_size**2)
        pad = "<|image_pad|>"
        filled = [re.sub(re.escape(pad), lambda _: pad * int(next(sizes)), one) for one in text]
        return transformers.BatchFeature({**self._words(filled, **options), **seen})


def qwen_image_edit(pipeline: str = "QwenImageEditPipeline") -> Any:
    """Input images become a megapixel whatever one asks for: so the autoencoder has next to no layers."""
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": _VISION_WORDS})
    made = getattr(diffusers, pipeline)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_vae(base_dim=2, dim_mult=[1] * 6, num_res_blocks=0, temperal_downsample=[False] * 5),
        text_encoder=_encoder(),
        tokenizer=words,
        processor=Processor(words),
        transformer=diffusers.QwenImageTransformer2DModel(**_SIZES),
    )
    template = "the of {}" if "Plus" in pipeline else "the of <|vision_start|><|image_pad|><|vision_end|>{}"
    made.prompt_template_encode, made.prompt_template_encode_start_idx = template, 2
    return made


_KWARGS = {"height": 32, "width": 32, "negative_prompt": "a dog on the hill", "true_cfg_scale": 2.0}
_EDIT = _KWARGS | {"height": 64, "width": 64}
_TALL = {"height": 128, "width": 64}

PIPELINES = {
    "qwen_image": Entry(qwen_image, _KWARGS, guidance="true_cfg_scale"),
    "qwen_image_img2img": Entry(
        partial(qwen_image, "QwenImageImg2ImgPipeline"),
        _KWARGS | {"strength": 0.9},
        "image to image",
        "true_cfg_scale",
        inputs=image,
    ),
    "qwen_image_inpaint": Entry(
        partial(qwen_image, "QwenImageInpaintPipeline"),
        _KWARGS | {"strength": 0.9},
        "inpainting",
        "true_cfg_scale",
        inputs=image_and_mask,
    ),
    "qwen_image_controlnet": Entry(
        qwen_image_controlnet, _KWARGS, "ControlNet", "true_cfg_scale", inputs=control_image
    ),
    "qwen_image_edit": Entry(qwen_image_edit, _EDIT, "editing", "true_cfg_scale", inputs=image, second={}),
    "qwen_image_edit_plus": Entry(
        partial(qwen_image_edit, "QwenImageEditPlusPipeline"),
        _EDIT,
        "editing",
        "true_cfg_scale",
        inputs=image,
        second=_TALL,
    ),
}
