"""Real-ESRGAN's networks: their sizes are read off their weights, whatever these are called."""

import re
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from sgld.models.super_resolution import Compact, Network, Rrdb, UnknownNetwork, label_of, network_of, unwrapped

RRDB = {"width": 8, "growth": 4, "num_blocks": 2}


def picture(height: int = 12, width: int = 16) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def nearest(scale: int) -> Compact:
    """A small network that repeats pixels."""
    network = Compact(width=4, num_layers=1, scale=scale)
    for weight in network.body[-1].parameters():
        torch.nn.init.zeros_(weight)
    return network


def of_2018(name: str) -> str:
    """The name of a weight before BasicSR 1.0, of a network with two doublings."""
    numbers = {"conv_first": "0", "conv_up1": "3", "conv_up2": "6", "conv_hr": "8", "conv_last": "10"}
    if match := re.match(r"body\.(\d)\.rdb(\d)\.(conv\d)\.(\w+)", name):
        return "model.1.sub.{}.RDB{}.{}.0.{}".format(*match.groups())
    layer, _, kind = name.rpartition(".")
    return f"model.1.sub.2.{kind}" if layer == "conv_body" else f"model.{numbers[layer]}.{kind}"


def of_esrgan(name: str) -> str:
    for new, old in (("conv_body", "trunk_conv"), ("conv_up", "upconv"), ("conv_hr", "HRconv"), (".rdb", ".RDB")):
        name = name.replace(new, old)
    return re.sub(r"^body\.", "RRDB_trunk.", name)


@torch.no_grad()
def test_small_network_adds_to_repeated_pixels() -> None:
    larger = nearest(3)(picture())
    torch.testing.assert_close(larger, functional.interpolate(picture(), scale_factor=3.0, mode="nearest"))


@pytest.mark.parametrize(
    ("network", "scale", "label"),
    [
        (Rrdb(**RRDB, num_doublings=2), 4, "RRDB 4x (2 blocks)"),
        (Rrdb(**RRDB, num_doublings=2, unshuffle=2), 2, "RRDB 2x (2 blocks)"),
        (Rrdb(**RRDB, num_doublings=3), 8, "RRDB 8x (2 blocks)"),
        (Compact(width=6, num_layers=3, scale=2), 2, "SRVGG 2x (3 layers)"),
    ],
)
@torch.no_grad()
def test_sizes_are_read_off_the_weights(network: Network, scale: int, label: str) -> None:
    read = network_of(network.state_dict())
    assert (read.scale, label_of(read)) == (scale, label)
    larger = read(picture())
    assert larger.shape == (1, 3, 12 * scale, 16 * scale)
    torch.testing.assert_close(larger, network(picture()), rtol=0, atol=0)


@pytest.mark.parametrize("rename", [of_2018, of_esrgan])
@torch.no_grad()
def test_older_names_are_understood(rename: Callable[[str], str]) -> None:
    network = Rrdb(**RRDB, num_doublings=2)
    state = {rename(name): weight for name, weight in network.state_dict().items()}
    assert len(state.keys() - network.state_dict().keys()) > 60
    torch.testing.assert_close(network_of(state)(picture()), network(picture()), rtol=0, atol=0)


def test_averaged_weights_count_more_than_others() -> None:
    averaged, others = {"module.a": torch.ones(1)}, {"a": torch.zeros(1)}
    assert unwrapped({"params": others, "params_ema": averaged}) == {"a": torch.ones(1)}
    with pytest.raises(UnknownNetwork, match="no weights by name"):
        unwrapped([1, 2])


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"conv_first.weight": torch.zeros(8, 3, 3, 3)},
        {"layers.0.weight": torch.zeros(2, 2)},
        # It would take minutes to make so many layers.
        {"body.0.weight": torch.zeros(8, 3, 3, 3), "body.10000000.weight": torch.zeros(12, 8, 3, 3)},
    ],
)
def test_other_networks_are_not_taken_for_these(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UnknownNetwork):
        network_of(state)
