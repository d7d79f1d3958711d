"""Kandinsky 5: videos and pictures."""

from typing import Any

import diffusers

from pipelines.entry import Entry, Kwargs
from pipelines.hunyuan import hunyuan_vae
from pipelines.language import long_clip, qwen_2_5
from pipelines.parts import redrawn, tokenizer, vae


def _with_short_template(pipeline: Any) -> Any:
    pipeline.prompt_template, pipeline.prompt_template_encode_start_idx = "the of {}", 2
    return pipeline


def _models(decoder: Any) -> tuple[Any, ...]:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=32,
        time_dim=32,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=48,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(8, 8, 8),
        visual_cond=False,
    )
    redrawn(transformer, "modulation", 0.05)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return transformer.eval(), decoder, qwen_2_5(), tokenizer(), long_clip(), tokenizer(), scheduler


def kandinsky_5_video() -> Any:
    return _with_short_template(diffusers.Kandinsky5T2VPipeline(*_models(hunyuan_vae())))


def kandinsky_5_image() -> Any:
    pipeline = _with_short_template(diffusers.Kandinsky5T2IPipeline(*_models(vae())))
    pipeline.resolutions = [(32, 32), (16, 64)]
    return pipeline


_SIZE: Kwargs = {"height": 32, "width": 32, "max_sequence_length": 16, "negative_prompt": "a dog on the hill"}

PIPELINES = {
    "kandinsky_5_video": Entry(kandinsky_5_video, _SIZE | {"num_frames": 5}, kind="text to video"),
    "kandinsky_5_image": Entry(kandinsky_5_image, _SIZE),
}
