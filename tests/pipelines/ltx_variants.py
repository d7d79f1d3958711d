"""LTX-Video from a picture, and LTX-2, which makes videos with sound."""

from typing import Any

import diffusers
import transformers
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

from pipelines.entry import Entry, Kwargs
from pipelines.language import SIZES
from pipelines.ltx import ltx
from pipelines.parts import image, tokenizer


def ltx_image_to_video() -> Any:
    return diffusers.LTXImageToVideoPipeline(**ltx().components)


def gemma_3() -> transformers.Gemma3ForConditionalGeneration:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    tokens = dict.fromkeys(("boi_token_index", "eoi_token_index", "image_token_index"), 1)
    config = transformers.Gemma3Config(text_config=SIZES, vision_config=vision, mm_tokens_per_image=4, **tokens)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def _connectors() -> LTX2TextConnectors:
    one = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    both = {f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in one.items()}
    return LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=3,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
        **both,
    ).eval()


def _video_vae() -> diffusers.AutoencoderKLLTX2Video:
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = False
    vae.use_framewise_decoding = False
    return vae.eval()


def _audio_vae() -> diffusers.AutoencoderKLLTX2Audio:
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        is_causal=True,
        mel_bins=8,
    ).eval()


def ltx_2() -> Any:
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=16,
        rope_double_precision=False,
        rope_type="split",
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        leaky_relu_negative_slope=0.1,
        output_sampling_rate=16000,
    )
    return diffusers.LTX2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_video_vae(),
        audio_vae=_audio_vae(),
        text_encoder=gemma_3(),
        tokenizer=tokenizer(),
        connectors=_connectors(),
        transformer=transformer,
        vocoder=vocoder,
    )


_SIZE: Kwargs = {"height": 32, "width": 32, "max_sequence_length": 16}
_TALL = {"height": 64, "width": 32}

PIPELINES = {
    "ltx_image_to_video": Entry(
        ltx_image_to_video, _SIZE | {"num_frames": 9}, kind="image to video", second=_TALL, inputs=image
    ),
    "ltx_2": Entry(
        ltx_2,
        _SIZE
        | {"num_frames": 5, "spatio_temporal_guidance_blocks": [0], "modality_scale": 1.0, "audio_modality_scale": 1.0},
        kind="text to video and audio",
        second=_TALL,
    ),
}
