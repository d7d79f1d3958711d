"""Hunyuan: videos, videos 1.5, pictures 2.1, and the DiT."""

from typing import Any

import diffusers
import transformers

from pipelines.entry import Entry, Kwargs
from pipelines.language import SIZES, llama, long_clip, qwen_2_5, qwen_2_5_text
from pipelines.parts import t5, tokenizer


def hunyuan_vae() -> diffusers.AutoencoderKLHunyuanVideo:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


def _scheduler() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)


def hunyuan_video() -> Any:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=32,
        rope_axes_dim=(2, 4, 4),
    )
    models = llama(), tokenizer(), transformer, hunyuan_vae(), _scheduler(), long_clip(), tokenizer()
    return diffusers.HunyuanVideoPipeline(*models)


def hunyuan_video_1_5() -> Any:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    decoder = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    pipeline = diffusers.HunyuanVideo15Pipeline(
        text_encoder=qwen_2_5_text(),
        tokenizer=tokenizer(),
        transformer=transformer,
        vae=decoder.eval(),
        scheduler=_scheduler(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
    )
    pipeline.system_message, pipeline.prompt_template_encode_start_idx = "the", 1
    pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length = 16, 8
    pipeline.vision_num_semantic_tokens = 4
    return pipeline


def hunyuan_image() -> Any:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=16,
        text_embed_2_dim=32,
        rope_axes_dim=(4, 4),
    )
    decoder = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        spatial_compression_ratio=8,
        sample_size=128,
        scaling_factor=0.47,
    )
    guiders = [diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=n) for n in (2, 3)]
    encoders = qwen_2_5(), tokenizer(), t5(), tokenizer()
    pipeline = diffusers.HunyuanImagePipeline(_scheduler(), decoder.eval(), *encoders, transformer, *guiders)
    pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx = "the of {}", 2
    pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length = 16, 8
    return pipeline


def hunyuan_dit() -> Any:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        hidden_size=24,
        text_len=77,
        text_len_t5=256,
        activation_fn="gelu-approximate",
    )
    # The pipeline takes it for granted that the VAE has a scale of 8.
    decoder = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
    )
    sizes = {name: SIZES[name] for name in SIZES if name not in ("num_key_value_heads", "head_dim")}
    bert = transformers.BertModel(transformers.BertConfig(**sizes, max_position_embeddings=77)).eval()
    return diffusers.HunyuanDiTPipeline(
        vae=decoder.eval(),
        text_encoder=bert,
        tokenizer=tokenizer(),
        transformer=transformer.eval(),
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
    )


_SIZE: Kwargs = {"height": 16, "width": 16, "negative_prompt": "a dog on the hill"}
_TALL = {"height": 32, "width": 16}

PIPELINES = {
    "hunyuan_video": Entry(
        hunyuan_video,
        _SIZE
        | {
            "num_frames": 9,
            "max_sequence_length": 16,
            "true_cfg_scale": 3.0,
            "prompt_template": {"template": "{}", "crop_start": 0},
        },
        kind="text to video",
        guidance="true_cfg_scale",
        second=_TALL,
    ),
    "hunyuan_video_1_5": Entry(hunyuan_video_1_5, _SIZE | {"num_frames": 5}, kind="text to video", guidance=None),
    "hunyuan_image": Entry(hunyuan_image, _SIZE, guidance=None, second=_TALL),
    "hunyuan_dit": Entry(hunyuan_dit, _SIZE | {"height": 32, "width": 64, "use_resolution_binning": False}),
}
