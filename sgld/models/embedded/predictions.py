"""How training calls each denoiser: exactly what its pipeline does, with less padding."""

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional

# WanPipeline's default max_sequence_length; beyond the prompt its denoiser sees zeros, unmasked.
WAN_TEXT_LENGTH = 512


def predict_image(text: nn.Module, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
    """PixArt's denoiser masks the padding, so that the shorter padding of `tokens` changes nothing."""
    mask = tokens != 0
    embeds = text(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    velocity: Tensor = denoiser(
        noisy,
        encoder_hidden_states=embeds,
        timestep=timestep,
        encoder_attention_mask=mask.to(noisy.dtype),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return velocity


def predict_video(text: nn.Module, denoiser: Any, noisy: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
    """Wan's denoiser sees the padding as zeros; `shorten_padding` makes few of them count as many."""
    mask = tokens != 0
    embeds = text(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    embeds = embeds * mask[:, :, None]
    # One processor serves all blocks.
    denoiser.blocks[0].attn2.processor.bias = padding_bias(mask, noisy.dtype)
    velocity: Tensor = denoiser(noisy, timestep, embeds, return_dict=False)[0]
    return velocity


def padding_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to attention scores, (B, 1, 1, L), so that the padding in `mask` (B, L) counts as if L were 512.

    Equal keys and values that occur n times weigh as one whose score is larger by log n.
    """
    num_tokens = mask.sum(1, keepdim=True)
    bias = ((WAN_TEXT_LENGTH - num_tokens) / (mask.shape[1] - num_tokens)).log()
    return bias.masked_fill(mask, 0.0)[:, None, None, :].to(dtype)


class ShortPadding:
    """An attention processor for Wan's cross attention, with a bias on the padding; shared by all blocks."""

    bias: Tensor

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> Tensor:
        """Cross attention with the bias. Source: WanAttnProcessor in diffusers 0.42.1, transformer_wan.py."""
        query, key, value = (
            projected.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for projected in (
                attn.norm_q(attn.to_q(hidden_states)),
                attn.norm_k(attn.to_k(encoder_hidden_states)),
                attn.to_v(encoder_hidden_states),
            )
        )
        bias = self.bias.to(value.dtype).expand(-1, 1, query.shape[2], -1)
        mixed = functional.scaled_dot_product_attention(
            query.to(value.dtype), key.to(value.dtype), value, attn_mask=bias
        )
        out: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2, 3))
        return out


def shorten_padding(denoiser: WanTransformer3DModel) -> None:
    """Makes the denoiser take short padding: predict_video needs it."""
    shared = ShortPadding()
    for block in denoiser.blocks:
        block.attn2.set_processor(shared)
