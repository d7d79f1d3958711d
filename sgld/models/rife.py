"""RIFE 4: a network that interpolates frames, with the weights of versions 4.22.lite, 4.25 and 4.26.

The layout of the weights is that of https://github.com/hzwer/Practical-RIFE (train_log/IFNet_HDv3.py), written anew:

    MIT License, Copyright (c) 2021 Zhewei Huang. Permission is hereby granted, free of charge, to any person obtaining
    a copy of this software and associated documentation files, to deal in the Software without restriction, provided
    that the above copyright notice and this permission notice are included in all copies or substantial portions of
    the Software. The Software is provided "as is", without warranty of any kind.

Source: Z. Huang et al., "Real-time intermediate flow estimation for video frame interpolation" (ECCV 2022).
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from sgld.models.optical_flow import warp

# What a block says of each pixel: flow to both frames, how much of the first is seen, and features for the next block.
_FLOW, _MASK, _FEATURES = 4, 1, 8
_NUM_RESIDUAL = 8
_OURS = re.compile(r"(block\d+|encode)\.")


@dataclass(frozen=True)
class RifeSizes:
    """The numbers in which versions differ."""

    widths: tuple[int, ...] = (192, 128, 64, 32)
    """Of the blocks, from the coarsest on."""
    head_width: int = 16
    head_features: int = 4


class UnknownLayout(ValueError):
    """Weights are those of another network."""


class Rife(nn.Module):
    """Blocks that refine flow from coarse to fine, each at twice the resolution of the one before."""

    label = "RIFE"

    def __init__(self, sizes: RifeSizes | None = None) -> None:
        super().__init__()
        sizes = sizes or RifeSizes()
        features = 2 * sizes.head_features
        for index, width in enumerate(sizes.widths):
            known = 7 + features + (_MASK + _FEATURES + _FLOW if index else 0)
            self.add_module(f"block{index}", _Block(known, width))
        self.encode = _Head(sizes.head_width, sizes.head_features)
        self._num_blocks = len(sizes.widths)

    def forward(self, first: torch.Tensor, last: torch.Tensor, time: float, scale: float = 1.0) -> torch.Tensor:
        """The frame at `time` (0 to 1) between two; all are (B, 3, H, W) in [0, 1].

        :param scale: motion is estimated at so many times the resolution.
        """
        height, width = first.shape[2:]
        multiple = 4 * 2 ** (self._num_blocks - 1)
        first, last = (functional.pad(frame, (0, -width % multiple, 0, -height % multiple)) for frame in (first, last))
        features = self.encode(first), self.encode(last)
        times = first.new_full((first.shape[0], 1, *first.shape[2:]), time)
        seen = torch.cat((first, last, *features, times), 1)
        flow, mask = None, first.new_zeros(())
        for index in range(self._num_blocks):
            factor = 2 ** (self._num_blocks - 1 - index) / scale
            change, mask, hidden = self.get_submodule(f"block{index}")(seen, flow, factor)
            flow = change if flow is None else flow + change
            if index < self._num_blocks - 1:
                warped = [warp(frame, flow[:, :2]) for frame in (first, features[0])]
                warped += [warp(frame, flow[:, 2:]) for frame in (last, features[1])]
                seen = torch.cat((warped[0], warped[2], warped[1], warped[3], times, mask, hidden), 1)
        assert flow is not None, "there is a block"
        share = torch.sigmoid(mask)
        merged = share * warp(first, flow[:, :2]) + (1 - share) * warp(last, flow[:, 2:])
        return merged[:, :, :height, :width]


class _Head(nn.Module):
    """Features of a frame."""

    def __init__(self, width: int, num_features: int) -> None:
        super().__init__()
        self.cnn0 = nn.Conv2d(3, width, 3, 2, 1)
        self.cnn1 = nn.Conv2d(width, width, 3, 1, 1)
        self.cnn2 = nn.Conv2d(width, width, 3, 1, 1)
        self.cnn3 = nn.ConvTranspose2d(width, num_features, 4, 2, 1)

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        for layer in (self.cnn0, self.cnn1, self.cnn2):
            frame = functional.leaky_relu(layer(frame), 0.2)
        return self.cnn3(frame)  # type: ignore[no-any-return]


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 1, 1)
        self.beta = nn.Parameter(torch.ones(1, width, 1, 1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.leaky_relu(self.conv(hidden) * self.beta + hidden, 0.2)


class _Block(nn.Module):
    """Flow, mask and features at one resolution, from all that is known."""

    def __init__(self, num_known: int, width: int) -> None:
        super().__init__()
        self.conv0 = nn.Sequential(_down(num_known, width // 2), _down(width // 2, width))
        self.convblock = nn.Sequential(*(_Residual(width) for _ in range(_NUM_RESIDUAL)))
        num_said = 4 * (_FLOW + _MASK + _FEATURES)
        self.lastconv = nn.Sequential(nn.ConvTranspose2d(width, num_said, 4, 2, 1), nn.PixelShuffle(2))

    def forward(
        self, seen: torch.Tensor, flow: torch.Tensor | None, factor: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """:param factor: how many pixels of the frame one here stands for."""
        size = seen.shape[2:]
        small = [4 * max(1, round(side / factor / 4)) for side in size]
        known = functional.interpolate(seen, small, mode="bilinear")
        if flow is not None:
            known = torch.cat((known, functional.interpolate(flow, small, mode="bilinear") / factor), 1)
        said = self.lastconv(self.convblock(self.conv0(known)))
        said = functional.interpolate(said, tuple(size), mode="bilinear")
        return said[:, :_FLOW] * factor, said[:, _FLOW : _FLOW + _MASK], said[:, _FLOW + _MASK :]


def _down(num_in: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(num_in, num_out, 3, 2, 1), nn.LeakyReLU(0.2))


def rife_of(state: Mapping[str, torch.Tensor]) -> Rife:
    """The network of these weights.

    :param state: names may begin with `module.`; what was only needed for training is left out.
    :raises UnknownLayout: they are those of another network, or of another version.
    """
    named = {name.removeprefix("module."): weight for name, weight in state.items()}
    named = {name: weight for name, weight in named.items() if _OURS.match(name)}
    widths = list(_widths(named))
    head = named.get("encode.cnn3.weight")
    if not widths or head is None or head.ndim != 4:
        raise UnknownLayout("they are not those of RIFE 4.22.lite, 4.25 or 4.26 (block0, ..., encode)")
    network = Rife(RifeSizes(tuple(widths), head.shape[0], head.shape[1]))
    _check_shapes(network.state_dict(), named)
    network.load_state_dict(named)
    return network


def _widths(named: Mapping[str, torch.Tensor]) -> Sequence[int]:
    weights = (named.get(f"block{index}.conv0.1.0.weight") for index in itertools.count())
    return [
        weight.shape[0]
        for weight in itertools.takewhile(lambda weight: weight is not None and weight.ndim == 4, weights)
        if weight is not None
    ]


def _check_shapes(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    missing, more = expected.keys() - given.keys(), given.keys() - expected.keys()
    if missing or more:
        raise UnknownLayout(
            f"{min(missing or more)} is {'missing' if missing else 'none of those of RIFE 4.22.lite, 4.25 and 4.26'}"
        )
    for name, weight in expected.items():
        if weight.shape != given[name].shape:
            shapes = f"{tuple(given[name].shape)} instead of {tuple(weight.shape)}"
            raise UnknownLayout(f"{name} is {shapes}, as in another version of RIFE than 4.22.lite, 4.25 and 4.26")
