"""PixArt."""

from functools import partial
from typing import Any

import diffusers
import torch

from pipelines.entry import Entry
from pipelines.parts import t5, tokenizer, vae


def pixart(pipeline: str = "PixArtSigmaPipeline", **options: Any) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
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
    parts = tokenizer(), t5(), vae(), transformer, diffusers.DPMSolverMultistepScheduler()
    return getattr(diffusers, pipeline)(*parts, **options)


_KWARGS = {
    "clean_caption": False,
    "height": 32,
    "width": 32,
    "use_resolution_binning": False,
    "max_sequence_length": 16,
}

PIPELINES = {
    "pixart": Entry(pixart, _KWARGS),
    "pixart_pag": Entry(
        partial(pixart, "PixArtSigmaPAGPipeline", pag_applied_layers=["blocks.1"]),
        _KWARGS | {"pag_scale": 2.0},
        merges=False,
        because="swaps attention processors while it runs, so each request runs alone",
    ),
}
