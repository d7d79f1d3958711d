"""Frames as soon as they are decoded, from VAEs that decode a video piece by piece.

Such a VAE (Wan's and Qwen's) calls its `decoder` once for each latent frame and puts the results together in the end.
A hook sees them as they come; nothing of the VAE is rewritten.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch


def can_stream(vae: Any) -> bool:
    """Whether the VAE decodes latent frames one after the other, whole, with a cache of its own in between."""
    is_tiled = getattr(vae, "use_tiling", False)
    has_cache = hasattr(vae, "_cached_conv_counts") and hasattr(vae, "clear_cache")
    return has_cache and hasattr(vae, "decoder") and not is_tiled


@contextlib.contextmanager
def streamed(vae: Any, on_frames: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """While a decode runs inside, give each piece to `on_frames` as the VAE's final samples would be.

    :param on_frames: gets (B, 3, F, H, W) in [-1, 1].
    """
    patch_size = getattr(vae.config, "patch_size", None)
    unpatchify = getattr(sys.modules[type(vae).__module__], "unpatchify", None)

    def on_piece(_module: torch.nn.Module, _args: Any, output: torch.Tensor) -> None:
        if patch_size is not None and unpatchify is not None:
            output = unpatchify(output, patch_size=patch_size)
        on_frames(output.clamp(-1.0, 1.0))

    handle = vae.decoder.register_forward_hook(on_piece)
    try:
        yield
    finally:
        handle.remove()
