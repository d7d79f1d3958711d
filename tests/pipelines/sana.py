"""Sana, Sana-Sprint and Sana-Video."""

from typing import Any

import diffusers

from pipelines.entry import Entry, Kwargs
from pipelines.language import gemma_2
from pipelines.parts import tokenizer, wan_vae


def _vae() -> diffusers.AutoencoderDC:
    blocks: dict[str, Any] = {
        "block_types": ("ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8),
        "qkv_multiscales": ((), (5,)),
        "layers_per_block": (1, 1),
    }
    both = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in blocks.items()}
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41,
        **both,
    ).eval()


def _transformer(**config: Any) -> diffusers.SanaTransformer2DModel:
    return diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=32,
        **config,
    )


def sana() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return diffusers.SanaPipeline(tokenizer(), gemma_2(), _vae(), _transformer(), scheduler)


def sana_sprint() -> Any:
    transformer = _transformer(qk_norm="rms_norm_across_heads", guidance_embeds=True)
    return diffusers.SanaSprintPipeline(tokenizer(), gemma_2(), _vae(), transformer, diffusers.SCMScheduler())


def sana_video() -> Any:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=8,
        patch_size=(1, 2, 2),
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.SanaVideoPipeline(tokenizer(), gemma_2(), wan_vae(), transformer, scheduler)


_SIZE: Kwargs = {
    "height": 32,
    "width": 32,
    "max_sequence_length": 16,
    "complex_human_instruction": None,
    "use_resolution_binning": False,
}
_TALL = {"height": 64, "width": 32}

PIPELINES = {
    "sana": Entry(sana, _SIZE, second=_TALL),
    "sana_sprint": Entry(sana_sprint, _SIZE | {"intermediate_timesteps": None}, second=_TALL),
    "sana_video": Entry(sana_video, _SIZE | {"frames": 9}, kind="text to video", second=_TALL),
}
