"""Families of one pipeline each that make pictures."""

from typing import Any

import diffusers
import torch
import transformers

from pipelines.entry import Entry, Kwargs
from pipelines.language import SIZES, gemma_2, qwen_3, qwen_3_vl
from pipelines.parts import VOCABULARY, clip, redrawn, t5, tokenizer, vae, wan_vae
from pipelines.qwen_image import qwen_image


def _scheduler(**config: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def aura_flow() -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    redrawn(transformer, "transformer_blocks", 0.3)
    config = transformers.UMT5Config(vocab_size=len(VOCABULARY), d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4)
    encoder = transformers.UMT5EncoderModel(config).eval()
    return diffusers.AuraFlowPipeline(tokenizer(), encoder, vae(), transformer, _scheduler())


def ovis_image() -> Any:
    transformer = diffusers.OvisImageTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.OvisImagePipeline(_scheduler(), vae(1, shift_factor=0.1), qwen_3(), tokenizer(), transformer)


def hidream() -> Any:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    ).eval()
    redrawn(transformer, "gate.weight")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, attn_implementation="eager")).eval()
    encoders = clip(has_projection=True), clip(has_projection=True), t5(), llama
    pairs = [part for encoder in encoders for part in (encoder, tokenizer())]
    pipeline = diffusers.HiDreamImagePipeline(_scheduler(), vae(4, shift_factor=0.1), *pairs, transformer)
    pipeline.default_sample_size = 16
    return pipeline


class _Unchecked(torch.nn.Module):
    """In the place of a safety checker of several GB."""

    dtype, device = torch.float32, torch.device("cpu")

    def check_text_safety(self, _prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def cosmos_2() -> Any:
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        rope_scale=(2.0, 1.0, 1.0),
        # Torchvision would resize it.
        concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    )
    scheduler = _scheduler(use_karras_sigmas=True)
    models = t5(), tokenizer(), transformer, wan_vae(), scheduler, _Unchecked()
    return diffusers.Cosmos2TextToImagePipeline(*models)


def krea_2() -> Any:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
        rope_theta=1000.0,
    )
    scheduler = _scheduler(use_dynamic_shifting=True)
    encoder = qwen_3_vl(), tokenizer(64)
    layers = {"text_encoder_select_layers": (0, 1, 2)}
    pipeline = diffusers.Krea2Pipeline(scheduler, qwen_image().vae, *encoder, transformer, **layers)
    pipeline.prompt_template_encode_prefix, pipeline.prompt_template_encode_start_idx = "the of ", 2
    pipeline.prompt_template_encode_suffix, pipeline.prompt_template_encode_num_suffix_tokens = "a hill", 2
    return pipeline


def prx() -> Any:
    transformer = diffusers.PRXTransformer2DModel(
        patch_size=1,
        in_channels=4,
        context_in_dim=16,
        hidden_size=8,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[2, 2],
    )
    redrawn(transformer, "final_layer", 0.1)
    redrawn(transformer, "modulation", 0.1)
    return diffusers.PRXPipeline(transformer, _scheduler(), gemma_2(), tokenizer(), vae(shift_factor=0.0))


def lumina() -> Any:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        norm_eps=1e-5,
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=16,
        scaling_factor=1.0,
    )
    redrawn(transformer, "gate", 0.5)
    redrawn(transformer, "norm_out", 0.3)
    return diffusers.LuminaPipeline(transformer, _scheduler(), vae(), gemma_2(), tokenizer())


def ideogram_4() -> Any:
    sizes: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "adaln_dim": 16,
        # 13 layers of the encoder are looked at, the last is the 36th.
        "llm_features_dim": 13 * 8,
        "rope_theta": 10_000,
        "mrope_section": (2, 1, 1),
        "norm_eps": 1e-5,
    }
    two = [diffusers.Ideogram4Transformer2DModel(**sizes) for _ in range(2)]
    decoder = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        patch_size=(2, 2),
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    encoder = qwen_3_vl(num_hidden_layers=36, hidden_size=8)
    return diffusers.Ideogram4Pipeline(_scheduler(), decoder.eval(), encoder, tokenizer(64), *two)


_SIZE: Kwargs = {"height": 32, "width": 32, "max_sequence_length": 16, "negative_prompt": "a dog on the hill"}

PIPELINES = {
    "aura_flow": Entry(aura_flow, _SIZE),
    "ovis_image": Entry(ovis_image, _SIZE),
    "hidream": Entry(hidream, _SIZE),
    "cosmos_2": Entry(cosmos_2, _SIZE),
    "krea_2": Entry(krea_2, _SIZE),
    "prx": Entry(
        prx, {"height": 32, "width": 32, "negative_prompt": "a dog on the hill", "use_resolution_binning": False}
    ),
    "lumina": Entry(lumina, _SIZE | {"clean_caption": False}),
    "ideogram_4": Entry(ideogram_4, {"height": 16, "width": 16, "max_sequence_length": 32, "guidance_schedule": None}),
}
