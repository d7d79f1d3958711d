"""The public layout of RIFE, and what its network does with weights that are known."""

import pytest
import torch

from sgld.models.rife import Rife, RifeSizes, UnknownLayout, rife_of

SMALL = RifeSizes(widths=(8, 8, 4, 4), head_width=4, head_features=2)
# Of flownet.pkl of version 4.22.lite.
SHAPES = {
    "block0.conv0.0.0.weight": (96, 15, 3, 3),
    "block0.conv0.1.0.bias": (192,),
    "block0.convblock.7.beta": (1, 192, 1, 1),
    "block0.convblock.0.conv.weight": (192, 192, 3, 3),
    "block0.lastconv.0.weight": (192, 52, 4, 4),
    "block3.conv0.0.0.weight": (16, 28, 3, 3),
    "block3.lastconv.0.bias": (52,),
    "encode.cnn0.weight": (16, 3, 3, 3),
    "encode.cnn3.weight": (16, 4, 4, 4),
}


def picture(width: int = 40, height: int = 24) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def still() -> Rife:
    """A network that sees no motion."""
    network = Rife(SMALL)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if ".lastconv." in name:
                weight.zero_()
    return network


def test_layout_is_the_public_one() -> None:
    state = Rife().state_dict()
    assert {name: tuple(state[name].shape) for name in SHAPES} == SHAPES
    assert len(state) == 4 * (4 + 8 * 3 + 2) + 8
    assert not any(name.startswith("block4") for name in state)


@pytest.mark.parametrize("sizes", [SMALL, RifeSizes((8, 8, 4, 4, 4), 4, 2)])
@torch.no_grad()
def test_weights_come_back_as_they_were_saved(sizes: RifeSizes) -> None:
    network = Rife(sizes)
    state = {f"module.{name}": weight for name, weight in network.state_dict().items()}
    read = rife_of(state | {"module.teacher.weight": torch.ones(1)})
    torch.testing.assert_close(
        read(picture(), picture().flip(3), 0.25, 1.0), network(picture(), picture().flip(3), 0.25, 1.0), rtol=0, atol=0
    )


@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0, 3.0])
@torch.no_grad()
def test_without_motion_a_frame_stays(scale: float) -> None:
    torch.testing.assert_close(still()(picture(), picture(), 0.5, scale), picture())


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@torch.no_grad()
def test_flow_is_in_pixels_whatever_the_scale(scale: float) -> None:
    network = still()
    # Four channels become one of twice the size; the first is flow to the right, of the first frame.
    network.get_parameter("block0.lastconv.0.bias")[0:4] = 2.0 * scale / 8
    network.get_parameter("block3.lastconv.0.bias")[16:20] = 50.0  # of which nothing but the first frame is seen
    between = network(picture(), torch.zeros_like(picture()), 0.5, scale)
    torch.testing.assert_close(between[..., :-2], picture()[..., 2:], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block1.lastconv.0.weight": torch.zeros(8, 24, 4, 4)}, r"block1\.lastconv\.0\.weight is \(8, 24, 4, 4\)"),
        ({"block0.extra": torch.zeros(1)}, r"block0\.extra is none of those"),
        ({"encode.cnn3.weight": None}, "not those of RIFE"),
        ({"encode.cnn3.weight": torch.zeros(())}, "not those of RIFE"),
        ({"block0.conv0.1.0.weight": torch.zeros(())}, "not those of RIFE"),
        ({"block2.convblock.3.beta": None}, r"block2\.convblock\.3\.beta is missing"),
    ],
)
def test_other_versions_are_refused(changed: dict[str, torch.Tensor | None], message: str) -> None:
    state = {name: value for name, value in (Rife(SMALL).state_dict() | changed).items() if value is not None}
    with pytest.raises(UnknownLayout, match=message):
        rife_of(state)
