"""Frames between frames without weights: motion by least squares, estimated right at the time that is asked for."""

import torch
from torch import nn
from torch.nn import functional

# Measured on textures and shapes that pan, zoom, turn and pass one another (bench/post_processing.py).
_NUM_ITERATIONS = 5
_SIGMA = 2.0
_SMALLEST_SIDE = 8
_MAX_STEP = 1.5
# Of the differences of colours in [0, 1]: larger ones count less, as what is hidden in one of the frames has no motion.
_NOISE = 0.02
_DAMPING = 1e-3


class OpticalFlow(nn.Module):
    """Interpolates by optical flow.

    Flow `v` is found where the new frame will be: such that the first frame at `x - t v` equals the last at
    `x + (1 - t) v`. So nothing has to be splatted, and no hole filled. Each step of Gauss and Newton solves for a
    window around each pixel, from coarse to fine; what moves in from beyond the border is taken from the frame that
    has it.

    Source: B. Lucas, T. Kanade, "An iterative image registration technique" (1981); robust weights as in M. Black,
    P. Anandan, "The robust estimation of multiple motions" (1996).
    """

    label = "optical flow"

    def forward(self, first: torch.Tensor, last: torch.Tensor, time: float, scale: float = 1.0) -> torch.Tensor:
        """The frame at `time` (0 to 1) between two; all are (B, C, H, W) in [0, 1].

        :param scale: motion is estimated at so many times the resolution.
        """
        flow = _flow(_resized(first, scale), _resized(last, scale), time)
        flow = _enlarged(flow, first.shape[2:])
        before, after = -time * flow, (1 - time) * flow
        weights = (1 - time) * _visible(before), time * _visible(after)
        return (weights[0] * warp(first, before) + weights[1] * warp(last, after)) / (weights[0] + weights[1])


def warp(image: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """An image (B, C, H, W) read where the flow (B, 2, H, W), in pixels to the right and down, points."""
    height, width = image.shape[2:]
    x, y = _positions(flow).unbind(1)
    grid = torch.stack((2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1), -1)
    return functional.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)


def _flow(first: torch.Tensor, last: torch.Tensor, time: float) -> torch.Tensor:
    pyramid = [(first, last)]
    while min(pyramid[-1][0].shape[2:]) >= 2 * _SMALLEST_SIDE:
        pyramid.append((_halved(pyramid[-1][0]), _halved(pyramid[-1][1])))
    flow = first.new_zeros(first.shape[0], 2, *pyramid[-1][0].shape[2:])
    for smaller in reversed(pyramid):
        flow = _enlarged(flow, smaller[0].shape[2:])
        for _ in range(_NUM_ITERATIONS):
            flow = _median(flow + _step(*smaller, flow, time))
    return flow


def _step(first: torch.Tensor, last: torch.Tensor, flow: torch.Tensor, time: float) -> torch.Tensor:
    """What flow (B, 2, H, W) lacks, by the colours around each pixel."""
    before, after = -time * flow, (1 - time) * flow
    earlier, later = warp(first, before), warp(last, after)
    dx, dy = _gradient(time * earlier + (1 - time) * later)
    change = later - earlier
    weight = _visible(before) * _visible(after) / (change.abs().mean(1, keepdim=True) + _NOISE)
    products = (dx * dx, dx * dy, dy * dy, dx * change, dy * change)
    sums = torch.cat([(weight * product).sum(1, keepdim=True) for product in products], 1)
    xx, xy, yy, xc, yc = (part[:, None] for part in _blurred(sums, _SIGMA).unbind(1))
    xx, yy = xx + _DAMPING, yy + _DAMPING
    determinant = xx * yy - xy * xy
    step = torch.cat((xy * yc - yy * xc, xy * xc - xx * yc), 1) / determinant
    return step.clamp(-_MAX_STEP, _MAX_STEP)


def _positions(flow: torch.Tensor) -> torch.Tensor:
    height, width = flow.shape[2:]
    rows = torch.arange(height, device=flow.device, dtype=flow.dtype)
    columns = torch.arange(width, device=flow.device, dtype=flow.dtype)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((x, y)) + flow


def _visible(flow: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W): 1 where flow points into the image, nearly 0 from a pixel beyond its border on."""
    positions = _positions(flow)
    limits = torch.tensor([flow.shape[3] - 1, flow.shape[2] - 1], device=flow.device).view(1, 2, 1, 1)
    beyond = torch.maximum(-positions, positions - limits).clamp(min=0).amax(1, keepdim=True)
    return (1 - beyond).clamp(min=1e-3)


def _gradient(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    padded = functional.pad(image, (1, 1, 1, 1), mode="replicate")
    dx = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    return dx, (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2


def _median(flow: torch.Tensor) -> torch.Tensor:
    """Of 3 by 3 pixels: motion has edges, and few of its errors have neighbours."""
    batch, channels, height, width = flow.shape
    windows = functional.unfold(functional.pad(flow, (1, 1, 1, 1), mode="replicate"), 3)
    return windows.view(batch, channels, 9, height, width).median(2).values


def _blurred(image: torch.Tensor, sigma: float) -> torch.Tensor:
    radius, channels = round(3 * sigma), image.shape[1]
    offsets = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(channels, 1, 1, -1)
    across = functional.conv2d(functional.pad(image, (radius, radius, 0, 0), mode="replicate"), kernel, groups=channels)
    down = functional.pad(across, (0, 0, radius, radius), mode="replicate")
    return functional.conv2d(down, kernel.transpose(2, 3), groups=channels)


def _halved(image: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(_blurred(image, 0.8), scale_factor=0.5, mode="bilinear")


def _resized(image: torch.Tensor, scale: float) -> torch.Tensor:
    size = [max(1, round(side * scale)) for side in image.shape[2:]]
    return image if scale == 1 else functional.interpolate(image, size, mode="bilinear", antialias=True)


def _enlarged(flow: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Flow at another size, in pixels of that size."""
    ratios = torch.tensor([size[1] / flow.shape[3], size[0] / flow.shape[2]], device=flow.device).view(1, 2, 1, 1)
    return functional.interpolate(flow, tuple(size), mode="bilinear") * ratios.to(flow.dtype)
