from collections.abc import Iterator

import pytest
import torch

from sgld.models.embedded.networks import video_autoencoder
from sgld.models.embedded.whole_clips import take_whole_clips

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("num_frames", [1, 5, 13])
def test_whole_clips_give_what_chunks_give(num_frames: int) -> None:
    torch.manual_seed(0)
    vae = video_autoencoder().eval()
    pixels = torch.randn(2, 3, num_frames, 32, 48)
    latents = vae.encode(pixels).latent_dist.mean
    decoded = vae.decode(latents).sample
    take_whole_clips(vae)
    torch.testing.assert_close(vae.encode(pixels).latent_dist.mean, latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vae.decode(latents).sample.clamp(-1, 1), decoded, atol=1e-5, rtol=1e-4)
