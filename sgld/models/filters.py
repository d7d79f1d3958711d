"""Filters change frames once a pipeline has made them: networks that interpolate or enlarge, found and loaded."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from sgld.errors import InvalidRequest
from sgld.models.filter_files import Unreadable, cached, find, read
from sgld.models.lookup import place
from sgld.models.optical_flow import OpticalFlow
from sgld.models.rife import Rife, UnknownLayout, rife_of
from sgld.models.super_resolution import UnknownNetwork, label_of, network_of, unwrapped
from sgld.models.tiles import Canvas
from sgld.outcome import one_line
from sgld.sampling_params import LANCZOS, OPTICAL_FLOW, RIFE_REPO, UPSCALING_REPO, SamplingParams

Kind = Literal["interpolation", "upscaling"]
_FIELDS = {"interpolation": "frame_interpolation_model_path", "upscaling": "upscaling_model_path"}
_RIFE_FILE = "flownet.pkl"
_NATIVE_SCALES = (2, 4, 8)


class FilterSource(NamedTuple):
    """What a filter is loaded from; an empty path is the default."""

    kind: Kind
    path: str
    stamp: tuple[int, int] = (0, 0)
    """Of a file of this machine: another one when it has changed."""


class Interpolator(nn.Module):
    """Makes frames between frames."""

    def __init__(self, network: Rife | OpticalFlow) -> None:
        super().__init__()
        self.network = network
        self.label = network.label

    def decode(self, first: torch.Tensor, last: torch.Tensor, time: float, scale: float) -> torch.Tensor:
        """The frame at `time` (0 to 1) between two; all are (1, H, W, 3 or 4), uint8. Alpha is blended."""
        pair = [frame.permute(0, 3, 1, 2).float() / 255 for frame in (first, last)]
        between = self.network(pair[0][:, :3], pair[1][:, :3], time, scale)
        alpha = (1 - time) * pair[0][:, 3:] + time * pair[1][:, 3:]
        return _to_uint8(torch.cat((between, alpha), 1))


class Upscaler(nn.Module):
    """Enlarges pictures by a network.

    :param run: what the network does, where that isn't a call: (1, 3, H, W) in [0, 1], sides multiples of `multiple`.
    :param radius: how many pixels around one count for it.
    :param bytes_per_pixel: what the network allocates for one of the picture, about, with numbers of one byte.
    :param is_half_enough: fp16 on a GPU is nearly the same: networks of Real-ESRGAN are used so by their authors.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        label: str,
        scale: int,
        radius: int,
        multiple: int,
        bytes_per_pixel: int,
        run: Callable[[torch.Tensor], torch.Tensor] | None = None,
        is_half_enough: bool = True,
    ) -> None:
        super().__init__()
        self.network = network
        self.label = label
        self.scale = scale
        self.radius = radius
        self.multiple = multiple
        self.num_weights = sum(weight.numel() for weight in network.parameters())
        self.bytes_per_pixel = bytes_per_pixel
        self.is_half_enough = is_half_enough
        self.edge: int | None = None
        """The sides of tiles, once that is decided."""
        self._run = run or network

    @property
    def dtype(self) -> torch.dtype:
        """In which the network computes."""
        return next((weight.dtype for weight in self.network.parameters()), torch.float32)

    def decode(self, picture: torch.Tensor, canvas: Canvas, index: int) -> torch.Tensor | None:
        """Enlarge tile `index` of a picture, (1, H, W, 3 or 4), uint8; with the last one the whole picture is there."""
        row, column = canvas.tiles[index]
        tile = picture[:, row.start : row.stop, column.start : column.stop].permute(0, 3, 1, 2).float() / 255
        return canvas.add(index, self._enlarged(tile))

    def _enlarged(self, tile: torch.Tensor) -> torch.Tensor:
        height, width = tile.shape[2:]
        padding = (0, -width % self.multiple, 0, -height % self.multiple)
        colours = functional.pad(tile[:, :3], padding, mode="replicate").to(self.dtype)
        size = height * self.scale, width * self.scale
        result = self._run(colours)[:, :, : size[0], : size[1]].float().clamp(0, 1)
        if tile.shape[1] == 3:
            return result
        return torch.cat((result, functional.interpolate(tile[:, 3:], size, mode="bilinear")), 1)


class Lanczos(nn.Module):
    """Enlarges pictures without a network."""

    label = LANCZOS

    def decode(self, picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """A picture, (1, H, W, 3 or 4), uint8, at another size: height and width."""
        image = Image.fromarray(picture[0].cpu().numpy())
        larger = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(larger))[None].to(picture.device)


Filter = Interpolator | Upscaler | Lanczos


def sources_of(params: SamplingParams) -> tuple[FilterSource, ...]:
    """The filters that a request needs."""
    sources = []
    if params.enable_frame_interpolation:
        sources.append(_source("interpolation", params.frame_interpolation_model_path or ""))
    if params.enable_upscaling:
        path = params.upscaling_model_path or UPSCALING_REPO
        if path == UPSCALING_REPO:
            # It has a file for each scale.
            path = f"{path}:RealESRGAN_x{_native(params.upscaling_scale)}.pth"
        sources.append(_source("upscaling", path))
    return tuple(sources)


def load_filter(source: FilterSource, device: torch.device) -> Filter:
    """Load a filter onto its device.

    :raises InvalidRequest: it can't be found, read or run here.
    """
    load = _interpolator if source.kind == "interpolation" else _upscaler
    with torch.no_grad():
        filter_ = load(source.path)
    if isinstance(filter_, Upscaler) and device.type == "cuda" and filter_.is_half_enough:
        filter_.half()
    return filter_.requires_grad_(False).eval().to(device)


def _source(kind: Kind, path: str) -> FilterSource:
    file = place(path)
    stat = file.stat() if file is not None else None
    return FilterSource(kind, path, (stat.st_mtime_ns, stat.st_size) if stat is not None else (0, 0))


def _native(scale: int) -> int:
    """The scale of the network for another scale: the next larger one."""
    return next((native for native in _NATIVE_SCALES if native >= scale), _NATIVE_SCALES[-1])


def _interpolator(path: str) -> Interpolator:
    """RIFE from a path; where none is given, from the hub's cache, or else optical flow."""
    file = cached(RIFE_REPO, _RIFE_FILE) if not path else None
    if path == OPTICAL_FLOW or (not path and file is None):
        return Interpolator(OpticalFlow())
    file = file or find(path, _FIELDS["interpolation"], ("flownet.*", "*/flownet.*"))
    try:
        return Interpolator(rife_of(unwrapped(read(file))))
    except (Unreadable, UnknownLayout, UnknownNetwork) as error:
        raise _refused("interpolation", path, error) from None


def _upscaler(path: str) -> Upscaler | Lanczos:
    if path == LANCZOS:
        return Lanczos()
    try:
        file = find(path, _FIELDS["upscaling"])
    except InvalidRequest as error:
        message = f"{str(error).rstrip('.')}; name a file of weights, or {LANCZOS!r}, which needs none"
        raise InvalidRequest(message, _FIELDS["upscaling"]) from None
    try:
        state = unwrapped(read(file))
        return _of_network(state) or _of_spandrel(state)
    except (Unreadable, UnknownNetwork) as error:
        raise _refused("upscaling", path, error) from None


def _of_network(state: dict[str, torch.Tensor]) -> Upscaler | None:
    try:
        network = network_of(state)
    except UnknownNetwork:
        return None
    return Upscaler(
        network,
        label=label_of(network),
        scale=network.scale,
        radius=network.radius,
        multiple=network.multiple,
        bytes_per_pixel=network.bytes_per_pixel,
    )


def _of_spandrel(state: dict[str, torch.Tensor]) -> Upscaler:
    """Any network that spandrel knows by its weights."""
    try:
        import spandrel
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        message = "they aren't of a network that sgld has itself (RRDB, SRVGG); spandrel knows others: pip install"
        raise UnknownNetwork(f"{message} 'sgld[upscale]' ({one_line(error)})") from None
    try:
        found = spandrel.ModelLoader().load_from_state_dict(state)
    except (spandrel.UnsupportedModelError, RuntimeError, KeyError, ValueError) as error:
        raise UnknownNetwork(f"spandrel knows no network of these weights: {one_line(error)}") from None
    if not isinstance(found, spandrel.ImageModelDescriptor) or (found.input_channels, found.output_channels) != (3, 3):
        raise UnknownNetwork(f"a network of {found.architecture.name} doesn't enlarge RGB pictures")
    return Upscaler(
        found.model,
        label=f"{found.architecture.name} {found.scale}x",
        scale=found.scale,
        radius=24,
        # Its own call pads to what the network needs.
        multiple=1,
        bytes_per_pixel=4 * 64 * found.scale**2,
        run=found,
        is_half_enough=found.supports_half,
    )


def _refused(kind: Kind, path: str, error: Exception) -> InvalidRequest:
    field = _FIELDS[kind]
    return InvalidRequest(f"{field} is {path[:200]!r}, whose weights can't be used: {one_line(error)}", field)


def _to_uint8(frames: torch.Tensor) -> torch.Tensor:
    return (frames * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
