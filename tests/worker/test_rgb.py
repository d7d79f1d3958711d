"""The linear map from latents to RGB."""

import pytest
import torch
from pipelines import TEN, build
from torch import nn

from sgld.worker.rgb import RgbMap
from worker.test_preview import LinearVae


def colours_and_latents(vae: LinearVae) -> tuple[torch.Tensor, torch.Tensor]:
    colours = torch.rand(1, 3, 4, 4) * 2 - 1
    return colours, torch.einsum("bchw,lc->blhw", colours, vae.mix) + 0.25


def test_map_finds_a_linear_vae() -> None:
    vae = LinearVae()
    colours, latents = colours_and_latents(vae)
    torch.testing.assert_close(RgbMap(vae)(latents[0]), colours[0].permute(1, 2, 0), atol=1e-3, rtol=0)


# The last has a VAE that can't encode several pictures at once.
@pytest.mark.parametrize("name", [*TEN, "hunyuan_video_1_5"])
def test_map_is_fitted_for_every_vae(name: str) -> None:
    pipeline, _ = build(name)
    channels = pipeline.vae.config.get("latent_channels", pipeline.vae.config.get("z_dim"))
    colours = RgbMap(pipeline.vae)(torch.randn(channels, 5, 4))
    assert colours.shape == (5, 4, 3)
    assert bool(colours.isfinite().all())


def test_map_follows_what_the_vae_decodes() -> None:
    vae = LinearVae()
    rgb = RgbMap(vae)
    colours, latents = colours_and_latents(vae)
    decoded = nn.functional.interpolate(-colours, scale_factor=4)
    rgb.learn(latents, decoded)
    torch.testing.assert_close(rgb(latents[0]), -colours[0].permute(1, 2, 0), atol=0.05, rtol=0)


def test_frames_are_learned_at_their_time() -> None:
    vae = LinearVae()
    rgb = RgbMap(vae)
    colours, latents = colours_and_latents(vae)
    video = torch.stack([latents, -latents], dim=2)
    decoded = torch.stack([-colours, -colours, colours, colours], dim=2)
    rgb.learn(video, nn.functional.interpolate(decoded, size=(4, 16, 16)))
    assert bool(rgb(latents[0]).isfinite().all())
