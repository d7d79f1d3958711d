"""AnimateDiff."""

from typing import Any

import diffusers

from pipelines.entry import Entry
from pipelines.parts import clip, tokenizer, vae
from pipelines.stable_diffusion import unet


def animatediff() -> Any:
    return diffusers.AnimateDiffPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=unet(),
        motion_adapter=diffusers.MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_norm_num_groups=4,
            motion_num_attention_heads=2,
        ),
        scheduler=diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False),
    )


PIPELINES = {
    "animatediff": Entry(
        animatediff, {"height": 32, "width": 32, "num_frames": 3, "guidance_scale": 5.0}, "text to video"
    )
}
