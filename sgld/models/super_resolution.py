"""Networks that enlarge pictures: those of Real-ESRGAN, with their sizes read off their weights.

The layouts of the weights are those of https://github.com/xinntao/BasicSR (basicsr/archs/rrdbnet_arch.py and
srvgg_arch.py), https://github.com/xinntao/ESRGAN (RRDBNet_arch.py) and of BasicSR before 1.0, written anew:

    Copyright 2018-2022 BasicSR Authors, Apache License 2.0; Copyright (c) 2021 Xintao Wang, BSD 3-Clause License:
    redistribution with or without modification is permitted provided that this notice is retained; the names of
    contributors may not be used for endorsement; provided "as is", without warranty of any kind.

Source: X. Wang et al., "ESRGAN" (ECCVW 2018) and "Real-ESRGAN" (ICCVW 2021).
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

State = Mapping[str, torch.Tensor]
_WRAPPERS = ("params_ema", "params", "state_dict")
_SLOPE = 0.2
_NUM_DENSE = 5


class UnknownNetwork(ValueError):
    """Weights are those of a network that isn't here."""


class Rrdb(nn.Module):
    """ESRGAN's network: blocks of dense layers, then one convolution after each doubling of the size.

    :param unshuffle: so many pixels of a side become channels first, as where the result is only twice as large.
    """

    def __init__(self, *, width: int, growth: int, num_blocks: int, num_doublings: int, unshuffle: int = 1) -> None:
        super().__init__()
        self.multiple = unshuffle
        self.scale = 2**num_doublings // unshuffle
        # One pixel sees farther, but hardly anything comes from there (bench/post_processing.py).
        self.radius = 24
        self.bytes_per_pixel = 4 * width * self.scale**2 + 4 * (width + _NUM_DENSE * growth)
        self.num_doublings = num_doublings
        self.conv_first = nn.Conv2d(3 * unshuffle**2, width, 3, 1, 1)
        self.body = nn.Sequential(*(_Block(width, growth) for _ in range(num_blocks)))
        self.conv_body = nn.Conv2d(width, width, 3, 1, 1)
        for number in range(1, num_doublings + 1):
            self.add_module(f"conv_up{number}", nn.Conv2d(width, width, 3, 1, 1))
        self.conv_hr = nn.Conv2d(width, width, 3, 1, 1)
        self.conv_last = nn.Conv2d(width, 3, 3, 1, 1)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1], larger; sides are multiples of `multiple`."""
        hidden = self.conv_first(functional.pixel_unshuffle(picture, self.multiple))
        hidden = hidden + self.conv_body(self.body(hidden))
        for number in range(1, self.num_doublings + 1):
            larger = functional.interpolate(hidden, scale_factor=2.0, mode="nearest")
            hidden = functional.leaky_relu(self.get_submodule(f"conv_up{number}")(larger), _SLOPE)
        return self.conv_last(functional.leaky_relu(self.conv_hr(hidden), _SLOPE))  # type: ignore[no-any-return]


class _Dense(nn.Module):
    """Each layer sees all that came before it."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        for number in range(1, _NUM_DENSE + 1):
            num_out = growth if number < _NUM_DENSE else width
            self.add_module(f"conv{number}", nn.Conv2d(width + (number - 1) * growth, num_out, 3, 1, 1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        seen = hidden
        for number in range(1, _NUM_DENSE):
            seen = torch.cat((seen, functional.leaky_relu(self.get_submodule(f"conv{number}")(seen), _SLOPE)), 1)
        return hidden + 0.2 * self.get_submodule(f"conv{_NUM_DENSE}")(seen)  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (_Dense(width, growth) for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 0.2 * self.rdb3(self.rdb2(self.rdb1(hidden)))  # type: ignore[no-any-return]


class Compact(nn.Module):
    """Real-ESRGAN's small network (SRVGG): what it adds to the repeated pixels of the picture."""

    multiple = 1

    def __init__(self, *, width: int, num_layers: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.radius = num_layers + 2
        self.bytes_per_pixel = 4 * (3 * width + 2 * 3 * scale**2)
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1), nn.PReLU(width)]
        for _ in range(num_layers):
            layers += [nn.Conv2d(width, width, 3, 1, 1), nn.PReLU(width)]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, 3 * scale**2, 3, 1, 1))

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1], larger."""
        nearest = functional.interpolate(picture, scale_factor=float(self.scale), mode="nearest")
        return nearest + functional.pixel_shuffle(self.body(picture), self.scale)


Network = Rrdb | Compact


def network_of(state: State) -> Network:
    """The network of these weights.

    :raises UnknownNetwork: they are those of another architecture.
    """
    named = _renamed(state)
    build = _rrdb if "conv_first.weight" in named else _compact
    try:
        network = build(named)
        network.load_state_dict(dict(named))
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise UnknownNetwork(str(error)) from None
    return network


def label_of(network: Network) -> str:
    """What the network is, for people; networks with an equal label take the same time."""
    if isinstance(network, Compact):
        return f"SRVGG {network.scale}x ({network.radius - 2} layers)"
    return f"RRDB {network.scale}x ({len(network.body)} blocks)"


def unwrapped(loaded: object) -> dict[str, torch.Tensor]:
    """The weights in what a file holds: some keep them under a name, beside those that weren't averaged.

    :raises UnknownNetwork: it holds something else.
    """
    while isinstance(loaded, Mapping) and (name := next((n for n in _WRAPPERS if n in loaded), None)) is not None:
        loaded = loaded[name]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise UnknownNetwork("the file holds no weights by name")
    return {str(name).removeprefix("module."): weight for name, weight in loaded.items()}


def _rrdb(named: State) -> Rrdb:
    first = named["conv_first.weight"]
    blocks = {int(match[1]) for name in named if (match := re.match(r"body\.(\d+)\.rdb1\.", name))}
    doublings = [name for name in named if re.fullmatch(r"conv_up\d+\.weight", name)]
    return Rrdb(
        width=first.shape[0],
        growth=named["body.0.rdb1.conv1.weight"].shape[0],
        num_blocks=len(blocks),
        num_doublings=len(doublings),
        unshuffle=math.isqrt(first.shape[1] // 3),
    )


def _compact(named: State) -> Compact:
    numbers = sorted(int(match[1]) for name in named if (match := re.fullmatch(r"body\.(\d+)\.weight", name)))
    last = named[f"body.{numbers[-1]}.weight"]
    # Counted: a number in a name may be anything, and layers take memory.
    return Compact(
        width=named["body.0.weight"].shape[0], num_layers=len(numbers) // 2 - 1, scale=math.isqrt(last.shape[0] // 3)
    )


_SINCE_ESRGAN = (
    (re.compile(r"RRDB_trunk\.(\d+)\.RDB(\d)\."), r"body.\1.rdb\2."),
    (re.compile(r"trunk_conv\."), "conv_body."),
    (re.compile(r"upconv(\d)\."), r"conv_up\1."),
    (re.compile(r"HRconv\."), "conv_hr."),
)


def _renamed(state: State) -> State:
    """The weights under the names that are used since BasicSR 1.0."""
    return _since_the_first(state) if "model.0.weight" in state else _by_rules(state)


def _by_rules(state: State) -> State:
    def new(name: str) -> str:
        for old, ours in _SINCE_ESRGAN:
            name = old.sub(ours, name)
        return name

    return {new(name): weight for name, weight in state.items()}


def _since_the_first(state: State) -> State:
    """Of before, when all layers of the network were numbered: doublings, then two more convolutions."""
    numbers = sorted({int(match[1]) for name in state if (match := re.match(r"model\.(\d+)\.", name))} - {0, 1})
    *doublings, hr, last = numbers
    names = {f"model.{number}": f"conv_up{index}" for index, number in enumerate(doublings, 1)}
    names |= {"model.0": "conv_first", f"model.{hr}": "conv_hr", f"model.{last}": "conv_last"}
    block = re.compile(r"model\.1\.sub\.(\d+)\.RDB(\d)\.(conv\d)\.0")

    def new(layer: str) -> str:
        if match := block.fullmatch(layer):
            return f"body.{match[1]}.rdb{match[2]}.{match[3]}"
        return "conv_body" if layer.startswith("model.1.sub.") else names.get(layer, layer)

    return {
        f"{new(layer)}.{kind}": weight
        for (layer, _, kind), weight in ((n.rpartition("."), w) for n, w in state.items())
    }
