from typing import Any

import pytest
import torch
from pipelines import build
from pipelines.parts import wan_vae

from sgld.worker.streaming import can_stream, streamed


def pieces_and_whole(vae: Any, latents: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    pieces: list[torch.Tensor] = []
    with torch.no_grad(), streamed(vae, pieces.append):
        whole: torch.Tensor = vae.decode(latents, return_dict=False)[0]
    return pieces, whole


@pytest.mark.parametrize("num_latent_frames", [1, 2, 5])
def test_pieces_put_together_are_the_decoded_video(num_latent_frames: int) -> None:
    torch.manual_seed(0)
    pieces, whole = pieces_and_whole(wan_vae(), torch.randn(1, 16, num_latent_frames, 3, 2))
    assert [piece.shape[2] for piece in pieces] == [1] + [4] * (num_latent_frames - 1)
    assert torch.equal(torch.cat(pieces, dim=2), whole)


def test_pieces_of_qwen_images_decoder_are_the_picture() -> None:
    pipeline, _ = build("qwen_image")
    pieces, whole = pieces_and_whole(pipeline.vae, torch.randn(1, 4, 1, 4, 4))
    assert torch.equal(torch.cat(pieces, dim=2), whole)


def test_decoding_afterwards_is_not_watched() -> None:
    vae = wan_vae()
    pieces, _ = pieces_and_whole(vae, torch.randn(1, 16, 2, 2, 2))
    with torch.no_grad():
        vae.decode(torch.randn(1, 16, 2, 2, 2))
    assert len(pieces) == 2


def test_decoding_that_fails_leaves_no_hook() -> None:
    vae = wan_vae()
    with pytest.raises(RuntimeError), streamed(vae, lambda _piece: None):
        vae.decode(torch.randn(1, 7, 2, 2, 2))
    assert len(vae.decoder._forward_hooks) == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("wan", True), ("wan_i2v", True), ("qwen_image", True), ("flux", False), ("ltx", False), ("cogvideox", False)],
)
def test_which_decoders_can_stream(name: str, expected: bool) -> None:
    pipeline, _ = build(name)
    assert can_stream(pipeline.vae) is expected


def test_decoder_that_works_in_tiles_can_not_stream() -> None:
    """Its pieces are parts of frames."""
    vae = wan_vae()
    vae.enable_tiling()
    assert not can_stream(vae)
