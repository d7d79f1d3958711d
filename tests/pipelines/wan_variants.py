"""Wan 2.2, VACE, video to video, and SkyReels-V2, which is built on Wan."""

from typing import Any

import diffusers
from PIL import Image

from pipelines.entry import Entry, Kwargs
from pipelines.parts import picture, t5, tokenizer, wan_vae

_TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def _transformer() -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(**_TRANSFORMER)


def _scheduler() -> diffusers.UniPCMultistepScheduler:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def wan_2_2() -> Any:
    two = {"transformer": _transformer(), "transformer_2": _transformer(), "boundary_ratio": 0.875}
    return diffusers.WanPipeline(tokenizer(), t5(), wan_vae(), _scheduler(), **two)


def wan_2_2_5b() -> Any:
    decoder = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        temperal_downsample=[False, True, True],
    )
    return diffusers.WanPipeline(tokenizer(), t5(), decoder.eval(), _scheduler(), _transformer(), expand_timesteps=True)


def wan_vace() -> Any:
    transformer = diffusers.WanVACETransformer3DModel(**_TRANSFORMER, vace_layers=[0, 1], vace_in_channels=96)
    return diffusers.WanVACEPipeline(tokenizer(), t5(), wan_vae(), _scheduler(), transformer)


def wan_video_to_video() -> Any:
    return diffusers.WanVideoToVideoPipeline(tokenizer(), t5(), _transformer(), wan_vae(), _scheduler())


def skyreels_v2() -> Any:
    transformer = diffusers.SkyReelsV2Transformer3DModel(**_TRANSFORMER)
    return diffusers.SkyReelsV2Pipeline(tokenizer(), t5(), transformer, wan_vae(), _scheduler())


def _video(index: int, kwargs: Kwargs) -> Kwargs:
    return {"video": [picture((index + frame) % 4, kwargs) for frame in range(9)]}


def _video_and_mask(index: int, kwargs: Kwargs) -> Kwargs:
    mask = Image.new("L", (kwargs["width"], kwargs["height"]), 0)
    mask.paste(255, (0, 0, kwargs["width"] // 2, kwargs["height"]))
    return _video(index, kwargs) | {"mask": [mask] * 9}


_SIZE: Kwargs = {"height": 16, "width": 16, "max_sequence_length": 16}
_CLIP: Kwargs = _SIZE | {"num_frames": 9}
_TALL = {"height": 32, "width": 16}

PIPELINES = {
    "wan_2_2": Entry(wan_2_2, _CLIP, kind="text to video", second=_TALL, variant="2.2, two transformers"),
    "wan_2_2_5b": Entry(
        wan_2_2_5b,
        _CLIP | {"height": 32, "width": 32},
        kind="text to video",
        second={"height": 64, "width": 32},
        variant="2.2, a timestep for each token",
    ),
    "wan_vace": Entry(wan_vace, _CLIP, kind="video editing", second=_TALL, inputs=_video_and_mask),
    "wan_video_to_video": Entry(wan_video_to_video, _SIZE, kind="video to video", second=_TALL, inputs=_video),
    "skyreels_v2": Entry(skyreels_v2, _CLIP, kind="text to video", second=_TALL),
}
