"""Tiles of a decode on several ranks: here threads, which exchange them."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
)

from sgld.worker.tiles import Shapes, shared

NUM_RANKS = 2


def picture_vae() -> Any:
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=2,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16)  # fmt: skip
    vae.enable_tiling()
    return vae


def wan_vae() -> Any:
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    vae.enable_tiling(32, 32, 16, 16)
    return vae


def cog_vae() -> Any:
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        sample_height=32, sample_width=32,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    vae.enable_tiling()
    return vae


def hunyuan_vae() -> Any:
    """Its frames are in tiles, too."""
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=(4,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )  # fmt: skip
    vae.enable_tiling(24, 24, 8, 16, 16, 4)
    return vae


def ltx_vae(*, is_noisy: bool = False) -> Any:
    vae = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, False), down_block_types=(
            "LTXVideoDownBlock3D",) * 2, decoder_spatio_temporal_scaling=(True, False), patch_size=1,
        decoder_inject_noise=(is_noisy,) * 3, upsample_residual=(False,) * 2, upsample_factor=(1,) * 2,
    )  # fmt: skip
    vae.enable_tiling(8, 8, 4, 6, 6, 2)
    return vae


def mochi_vae() -> Any:
    """Its decoder returns a cache that nobody asked for."""
    vae = AutoencoderKLMochi(
        latent_channels=4, out_channels=3, encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5,
    )  # fmt: skip
    vae.enable_tiling(32, 32, 16, 16)
    return vae


class Exchange:
    """What `share` does, between threads."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(NUM_RANKS, timeout=30)
        self._value: torch.Tensor | None = None

    def of(self, rank: int) -> Callable[[torch.Tensor, int], torch.Tensor]:
        def share(value: torch.Tensor, owner: int) -> torch.Tensor:
            if rank == owner:
                self._value = value
            self._barrier.wait()
            assert self._value is not None
            result = self._value.clone()
            self._barrier.wait()
            return result

        return share


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (picture_vae, (1, 4, 24, 24)),
        (wan_vae, (1, 16, 3, 6, 6)),
        (cog_vae, (1, 4, 3, 2, 4)),
        (hunyuan_vae, (1, 4, 4, 4, 3)),
        (hunyuan_vae, (1, 4, 5, 2, 2)),
        (ltx_vae, (1, 4, 3, 6, 6)),
        (mochi_vae, (1, 4, 2, 6, 6)),
    ],
    ids=["picture", "wan", "cogvideox", "hunyuanvideo", "hunyuanvideo, frames only", "ltx", "mochi"],
)
def test_each_rank_computes_a_share_and_gets_the_whole(make: Callable[[], Any], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    vaes = [make().eval() for _ in range(NUM_RANKS)]
    for vae in vaes:
        vae.load_state_dict(vaes[0].state_dict())
    counts = [[0] * 3 for _ in vaes]
    shapes, exchange = [Shapes() for _ in vaes], Exchange()
    latents = [torch.randn(shape) for _ in range(3)]

    def run(rank: int) -> list[torch.Tensor]:
        vae, results, own = vaes[rank], [], vaes[rank].decoder.conv_in.forward
        with torch.no_grad():
            for index, z in enumerate(latents):

                def counted(*args: Any, index: int = index, **kwargs: Any) -> Any:
                    counts[rank][index] += 1
                    return own(*args, **kwargs)

                vae.decoder.conv_in.forward = counted
                with shared(vae, rank, NUM_RANKS, shapes[rank], exchange.of(rank)):
                    results.append(vae.decode(z).sample)
        return results

    with ThreadPoolExecutor(NUM_RANKS) as pool:
        ranks = list(pool.map(run, range(NUM_RANKS)))
    plain = make().eval()
    plain.load_state_dict(vaes[0].state_dict())
    with torch.no_grad():
        wanted = [plain.decode(z).sample for z in latents]
    for results in ranks:
        assert all(torch.equal(got, want) for got, want in zip(results, wanted, strict=True))
    in_first, in_last = sum(count[0] for count in counts), sum(count[2] for count in counts)
    assert in_last < in_first
    assert "decode" not in vars(vaes[0])


def test_decode_that_fails_leaves_nothing_known_that_others_may_not_know() -> None:
    vae, shapes, results = picture_vae(), Shapes(), [1, 1]
    own = vae.decoder.conv_in.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not results:
            raise torch.OutOfMemoryError("too large")
        results.pop()
        return own(*args, **kwargs)

    vae.decoder.conv_in.forward = forward
    with pytest.raises(torch.OutOfMemoryError), shared(vae, 0, 1, shapes, lambda value, _: value), torch.no_grad():
        vae.decode(torch.randn(1, 4, 24, 24))
    assert shapes.known == {}


def test_decoder_that_draws_random_numbers_is_run_as_a_whole_by_all() -> None:
    """Else the numbers for a tile weren't those that it gets on one rank."""
    torch.manual_seed(0)
    vae, latents, shapes = ltx_vae(is_noisy=True).eval(), torch.randn(1, 4, 3, 6, 6), Shapes()
    for name, scale in vae.named_parameters():
        if "per_channel_scale" in name:
            torch.nn.init.ones_(scale)

    def seeded() -> torch.Tensor:
        torch.manual_seed(1)
        return vae.decode(latents).sample  # type: ignore[no-any-return]

    def never(_value: torch.Tensor, _owner: int) -> torch.Tensor:
        raise AssertionError("nothing is shared")

    with torch.no_grad():
        wanted = seeded()
        assert not torch.equal(wanted, vae.decode(latents).sample)
        for _ in range(2):
            with shared(vae, 1, NUM_RANKS, shapes, never):
                assert torch.equal(seeded(), wanted)


def test_decoder_that_draws_from_a_given_generator_is_run_as_a_whole_by_all() -> None:
    torch.manual_seed(0)
    vae, latents, shapes = picture_vae().eval(), torch.randn(1, 4, 24, 24), Shapes()
    own, given = vae.decoder.forward, [torch.Generator()]

    def noisy(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = own(x) + torch.rand(1, generator=given[0])
        return result

    def never(_value: torch.Tensor, _owner: int) -> torch.Tensor:
        raise AssertionError("nothing is shared")

    def seeded() -> torch.Tensor:
        given[0] = torch.Generator().manual_seed(1)
        return vae.decode(latents, generator=given[0]).sample  # type: ignore[no-any-return]

    vae.decoder.forward = noisy
    with torch.no_grad():
        wanted = seeded()
        for _ in range(2):
            with shared(vae, 1, NUM_RANKS, shapes, never):
                assert torch.equal(seeded(), wanted)
