"""A denoiser of layers that repeat, as compilation looks for."""

import torch
from torch import nn


class Block(nn.Module):
    """A layer as denoisers have many of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.gelu(self.inner(x))


class Denoiser(nn.Module):
    """Layers one after the other."""

    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
