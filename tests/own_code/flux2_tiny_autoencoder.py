"""A small autoencoder for Flux 2, which isn't one of diffusers' classes."""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import nn


class Flux2TinyAutoEncoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, latent_channels: int = 32, block_out_channels: tuple[int, ...] = (8,), batch_norm_eps: float = 1e-4
    ) -> None:
        super().__init__()
        # Flux 2 reads the statistics of its latents, patches of 2 x 2, from its autoencoder.
        self.bn = nn.BatchNorm2d(4 * latent_channels, eps=batch_norm_eps, affine=False)
        self.decoder = nn.Sequential(nn.Conv2d(latent_channels, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 1))

    def decode(self, z: torch.Tensor, return_dict: bool = True) -> Any:
        sample = self.decoder(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)
