"""Pipelines of diffusers with tiny random components, made here: no hub is reached."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

WORDS = "a an the red green blue cat dog sun moon hill lake on under over of"
VOCABULARY = ["<pad>", "</s>", "<unk>", *WORDS.split()]


def tokenizer(max_length: int = 16) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=max_length
    )
    made.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return made


def clip(*, has_projection: bool = False) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    return (CLIPTextModelWithProjection if has_projection else CLIPTextModel)(config).eval()


def t5() -> T5EncoderModel:
    config = T5Config(vocab_size=len(VOCABULARY), d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4)
    return T5EncoderModel(config).eval()


def vae(latent_channels: int = 4, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=latent_channels,
        **config,
    ).eval()


def wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def flux() -> Any:
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae(1, shift_factor=0.1), clip(), tokenizer(), t5(), tokenizer(), transformer
    )


def sdxl() -> Any:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=1,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        cross_attention_dim=64,
        norm_num_groups=4,
        sample_size=16,
    )
    return StableDiffusionXLPipeline(
        vae(), clip(), clip(has_projection=True), tokenizer(), tokenizer(), unet, EulerDiscreteScheduler()
    )


def sd3() -> Any:
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    encoders = clip(has_projection=True), tokenizer(), clip(has_projection=True), tokenizer(), t5(), tokenizer()
    return StableDiffusion3Pipeline(transformer, scheduler, vae(4, shift_factor=0.06), *encoders)


def qwen_image() -> Any:
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(VOCABULARY),
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1000000.0},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, vision_start_token_id=1, vision_end_token_id=1)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    decoder = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    pipeline = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), decoder.eval(), encoder, tokenizer(), transformer)
    pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx = "the of {}", 2
    return pipeline


def z_image() -> Any:
    transformer = ZImageTransformer2DModel(
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
    config = Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(VOCABULARY),
    )
    return ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae(16, scaling_factor=0.36, shift_factor=0.1),
        Qwen3Model(config).eval(),
        tokenizer(),
        transformer,
    )


def _wan_transformer(**config: Any) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        **config,
    )


def wan() -> Any:
    return WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=wan_vae(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=_wan_transformer(in_channels=16, out_channels=16),
    )


def wan_i2v() -> Any:
    vision = CLIPVisionConfig(
        hidden_size=4,
        projection_dim=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=16,
        patch_size=1,
    )
    return WanImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        image_processor=CLIPImageProcessor(crop_size=32, size=32),
        image_encoder=CLIPVisionModel(vision).eval(),
        transformer=_wan_transformer(in_channels=36, out_channels=16, image_dim=4),
    )


def ltx() -> Any:
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    decoder = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    decoder.use_framewise_encoding = False
    decoder.use_framewise_decoding = False
    return LTXPipeline(FlowMatchEulerDiscreteScheduler(), decoder.eval(), t5(), tokenizer(), transformer)


def cogvideox() -> Any:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=16,
    )
    blocks = {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
    }
    decoder = AutoencoderKLCogVideoX(latent_channels=4, layers_per_block=1, norm_num_groups=2, **blocks)
    return CogVideoXPipeline(tokenizer(), t5(), decoder.eval(), transformer, CogVideoXDDIMScheduler())


def pixart() -> Any:
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        num_embeds_ada_norm=1000,
        use_additional_conditions=False,
    )
    # An untrained one predicts zeros: the noise of a step would be all that a picture depends on.
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    return PixArtSigmaPipeline(tokenizer(), t5(), vae(), transformer, DPMSolverMultistepScheduler())


BUILDERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "flux": (flux, {"height": 16, "width": 16, "max_sequence_length": 16, "guidance_scale": 3.0}),
    "sdxl": (sdxl, {"height": 32, "width": 32, "guidance_scale": 5.0}),
    "sd3": (sd3, {"height": 32, "width": 32, "max_sequence_length": 16, "guidance_scale": 5.0}),
    "qwen_image": (
        qwen_image,
        {"height": 32, "width": 32, "negative_prompt": "a dog on the hill", "true_cfg_scale": 2.0},
    ),
    "z_image": (z_image, {"height": 32, "width": 32, "guidance_scale": 3.0, "max_sequence_length": 16}),
    "wan": (wan, {"height": 16, "width": 16, "num_frames": 9, "max_sequence_length": 16}),
    "wan_i2v": (wan_i2v, {"height": 16, "width": 16, "num_frames": 9}),
    "ltx": (ltx, {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}),
    "cogvideox": (cogvideox, {"height": 16, "width": 16, "num_frames": 8, "max_sequence_length": 16}),
    "pixart": (
        pixart,
        {"clean_caption": False, "height": 32, "width": 32, "use_resolution_binning": False, "max_sequence_length": 16},
    ),
}


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline, the same each time, and arguments that suit it."""
    torch.manual_seed(0)
    builder, kwargs = BUILDERS[name]
    pipeline = builder()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, dict(kwargs)
