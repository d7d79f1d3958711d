"""Flux 2."""

from functools import partial
from typing import Any

import diffusers
import transformers

from pipelines.entry import Entry
from pipelines.parts import VOCABULARY, image, qwen3, tokenizer


def _parts(num_blocks: int = 1, **config: Any) -> dict[str, Any]:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
        **config,
    )
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * num_blocks,
        up_block_types=("UpDecoderBlock2D",) * num_blocks,
        block_out_channels=(4,) * num_blocks,
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return {"transformer": transformer, "vae": vae.eval(), "scheduler": scheduler}


def flux2(num_blocks: int = 1) -> Any:
    text = {
        "model_type": "mistral",
        "vocab_size": len(VOCABULARY),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 30,
        "patch_size": 6,
    }
    config = transformers.Mistral3Config(text_config=text, vision_config=vision)
    words = tokenizer()
    # Without the system message, which is longer than a tiny prompt may be.
    words.chat_template = "{{ messages[-1].content[0].text }}"
    encoder = transformers.Mistral3ForConditionalGeneration(config).eval()
    return diffusers.Flux2Pipeline(text_encoder=encoder, tokenizer=words, **_parts(num_blocks))


def flux2_klein() -> Any:
    encoder = qwen3("Qwen3ForCausalLM")
    return diffusers.Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer(), **_parts(guidance_embeds=False))


_KWARGS = {"height": 8, "width": 8, "max_sequence_length": 16, "text_encoder_out_layers": (1,)}
_OTHER = {"height": 16, "width": 4}

PIPELINES = {
    "flux2": Entry(flux2, _KWARGS, second=_OTHER),
    # Input images have 64 x 64 pixels at least.
    "flux2_edit": Entry(
        partial(flux2, num_blocks=4),
        _KWARGS | {"height": 64, "width": 64},
        "editing",
        inputs=image,
        second={"height": 128, "width": 64},
        variant="with an image",
    ),
    "flux2_klein": Entry(flux2_klein, _KWARGS, second=_OTHER),
}
