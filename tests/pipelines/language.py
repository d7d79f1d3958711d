"""Tiny random language models, as pipelines have them for text encoders."""

from typing import Any

import transformers

from pipelines.parts import VOCABULARY

# Wide weights, so that prompts make a difference.
SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
VISION_SIZES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
ROPE = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1000000.0}


def llama() -> transformers.LlamaModel:
    return transformers.LlamaModel(transformers.LlamaConfig(**SIZES)).eval()


def gemma_2() -> transformers.Gemma2Model:
    return transformers.Gemma2Model(transformers.Gemma2Config(**SIZES)).eval()


def qwen_3() -> transformers.Qwen3Model:
    return transformers.Qwen3Model(transformers.Qwen3Config(**SIZES)).eval()


def qwen_2_5_text() -> transformers.Qwen2_5_VLTextModel:
    config = transformers.Qwen2_5_VLTextConfig(**SIZES, rope_parameters=ROPE)
    return transformers.Qwen2_5_VLTextModel(config).eval()


def qwen_2_5() -> transformers.Qwen2_5_VLForConditionalGeneration:
    tokens = {"vision_start_token_id": 1, "vision_end_token_id": 1}
    text = SIZES | {"rope_parameters": ROPE}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=VISION_SIZES, **tokens)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_3_vl(**text: Any) -> transformers.Qwen3VLModel:
    rope = ROPE | {"mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config=SIZES | {"rope_parameters": rope} | text, vision_config=VISION_SIZES
    )
    return transformers.Qwen3VLModel(config).eval()


def long_clip() -> transformers.CLIPTextModel:
    """Of 77 tokens, as pipelines have it that don't ask its tokenizer for the length."""
    sizes = {
        name: SIZES[name] for name in SIZES if name not in ("num_key_value_heads", "head_dim", "initializer_range")
    }
    config = transformers.CLIPTextConfig(**sizes | {"hidden_size": 32}, max_position_embeddings=77)
    return transformers.CLIPTextModel(config).eval()
