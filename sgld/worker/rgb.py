"""From a VAE's latents to RGB by a linear map: fitted to the VAE itself, and then to what it decodes."""

from typing import Any

import torch
from torch.nn.functional import interpolate

# How many pictures the map is fitted on at first, and their side, in latent pixels but not over so many pixels.
_NUM_PICTURES, _SIDE, _MAX_SIDE = 16, 16, 256
# Size of the details of these pictures, as parts of a side, and how much of them there is.
_DETAILS = ((1, 0.7), (3, 0.5), (8, 0.3), (32, 0.1))
# Frames of a still video: its last latent frame is one of those that have others before them, as most have.
_NUM_FRAMES = 5
# How much the first fit counts beside what was decoded.
_PRIOR = 1e-3


class RgbMap:
    """Maps latents of one VAE to RGB in [-1, 1].

    :raises AttributeError: the VAE has no encoder.
    """

    def __init__(self, vae: Any) -> None:
        latents, colours = _first_pairs(vae)
        self._map: torch.Tensor = torch.linalg.lstsq(_with_one(latents), colours).solution
        self._first = self._map
        num_rows = len(self._map)
        self._inner = torch.zeros(num_rows, num_rows)
        self._outer = torch.zeros(num_rows, 3)

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """(C, H, W) to (H, W, 3)."""
        return _with_one(latents.movedim(0, -1).float()) @ self._map.to(latents.device)

    def learn(self, latents: torch.Tensor, pixels: torch.Tensor) -> None:
        """Fit it to what the VAE decoded as well: latents (B, C, [F,] H, W), pixels (B, 3, [F,] H, W) in [-1, 1]."""
        x, y = _with_one(_rows(latents)), _rows(_pooled(pixels.float(), latents.shape[2:]))
        self._inner += (x.T @ x).cpu()
        self._outer += (x.T @ y).cpu()
        prior = _PRIOR * self._inner.diagonal().mean() * torch.eye(len(self._inner))
        self._map = torch.linalg.solve(self._inner + prior, self._outer + prior @ self._first)


def _first_pairs(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (N, C) of random pictures and their colours (N, 3) in [-1, 1]."""
    parameter = next(vae.parameters())
    ratio = int(getattr(vae, "spatial_compression_ratio", 0) or 2 ** (len(vae.config.block_out_channels) - 1))
    pictures = _random_pictures(min(_SIDE * ratio, _MAX_SIDE))
    # Three-dimensional convolutions: it takes videos.
    is_video = any(weight.ndim == 5 for weight in getattr(vae, "encoder", vae).parameters())
    given = pictures.unsqueeze(2).expand(-1, -1, _NUM_FRAMES, -1, -1) if is_video else pictures
    with torch.no_grad():
        # One by one: some VAEs can't encode several.
        latents = torch.cat([_encoded(vae, one.to(parameter.device, parameter.dtype)) for one in torch.split(given, 1)])
    if is_video:
        latents = latents[:, :, -1]
    return _rows(latents), _rows(_pooled(pictures, latents.shape[2:]))


def _encoded(vae: Any, given: torch.Tensor) -> torch.Tensor:
    encoded = vae.encode(given)
    distribution = getattr(encoded, "latent_dist", None)
    latents: torch.Tensor = distribution.mode() if distribution is not None else encoded[0]
    return latents.float().cpu()


def _random_pictures(side: int) -> torch.Tensor:
    """(N, 3, side, side) in [-1, 1]: noise of several sizes, the same each time."""
    generator = torch.Generator().manual_seed(0)
    layers = (
        weight * interpolate(torch.randn(_NUM_PICTURES, 3, n, n, generator=generator), (side, side), mode="bicubic")
        for n, weight in _DETAILS
    )
    return torch.stack(list(layers)).sum(0).clamp(-1, 1)


def _pooled(pixels: torch.Tensor, size: torch.Size) -> torch.Tensor:
    return interpolate(pixels, tuple(size), mode="area")


def _rows(values: torch.Tensor) -> torch.Tensor:
    """(B, C, ...) to (N, C)."""
    return values.float().movedim(1, -1).flatten(0, -2)


def _with_one(rows: torch.Tensor) -> torch.Tensor:
    """A constant beside the channels in the last axis."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)
