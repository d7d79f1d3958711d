"""Previews: the clean latents that a step predicts, turned to RGB by a linear map fitted against the VAE itself."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import torch

from sgld.worker.pixels import to_uint8
from sgld.worker.rgb import RgbMap
from sgld.worker.steps import WatchedStep, schedulers_of
from sgld.worker.task import Task

# A glue between the noise scheduler's sample and the VAE's input that leaves more than this, relative, isn't one.
_GLUE_ERROR = 1e-3
Geometry = tuple[str, tuple[int, ...]]


def steps_to_show(num_previews: int, num_steps: int) -> frozenset[int]:
    """After which steps (counted from 1) a preview is sent: evenly spread, not after the last."""
    count = min(num_previews, max(num_steps - 1, 0))
    return frozenset(round((index + 1) * num_steps / (count + 1)) for index in range(count))


def predicted_clean(scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> Any:
    """The clean latents that a noise scheduler would arrive at in one go, or None if it isn't known how.

    To be asked before `scheduler.step`. Source: the `step` and `convert_model_output` methods of diffusers'
    noise schedulers.
    """
    config = scheduler.config
    prediction = config.get("prediction_type", "flow_prediction" if "shift" in config else "epsilon")
    if getattr(scheduler, "step_index", 0) is None:
        scheduler._init_step_index(timestep)
    if hasattr(scheduler, "sigmas") and hasattr(scheduler, "step_index"):
        # Left on its device, which may be the host: to copy a number waits for the other one.
        sigma = scheduler.sigmas[scheduler.step_index]
        if hasattr(scheduler, "precondition_outputs"):
            return scheduler.precondition_outputs(sample, model_output, sigma)
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
            return _from_signal(prediction, model_output, sample, *scheduler._sigma_to_alpha_sigma_t(sigma))
        return _from_sigma(prediction, model_output, sample, sigma)
    if hasattr(scheduler, "alphas_cumprod"):
        alpha = scheduler.alphas_cumprod[int(timestep)]
        return _from_signal(prediction, model_output, sample, alpha**0.5, (1 - alpha) ** 0.5)
    return None


def _from_sigma(prediction: str, output: torch.Tensor, sample: torch.Tensor, sigma: torch.Tensor) -> Any:
    """Where a sample is the clean one plus `sigma` times noise, or (flow) a mixture of both."""
    if prediction in ("flow_prediction", "epsilon"):
        return sample - sigma * output
    if prediction == "v_prediction":
        return output * (-sigma / (sigma**2 + 1) ** 0.5) + sample / (sigma**2 + 1)
    return output if prediction == "sample" else None


def _from_signal(
    prediction: str, output: torch.Tensor, sample: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor
) -> Any:
    """Where a sample is `signal` times the clean one plus `noise` times noise."""
    if prediction == "flow_prediction":
        return sample - noise * output
    if prediction == "epsilon":
        return (sample - noise * output) / signal
    if prediction == "v_prediction":
        return signal * sample - noise * output
    return output if prediction == "sample" else None


@dataclass(frozen=True)
class Glue:
    """From the noise scheduler's sample to the VAE's input: `arrange`, then a scale and a shift of each channel."""

    arrange: Callable[[torch.Tensor], torch.Tensor]
    scale: torch.Tensor
    shift: torch.Tensor

    def __call__(self, sample: torch.Tensor) -> torch.Tensor:
        """The VAE's input, (B, C, [F,] H, W)."""
        arranged = self.arrange(sample).float()
        shape = (1, -1, *(1,) * (arranged.ndim - 2))
        return arranged * self.scale.reshape(shape) + self.shift.reshape(shape)


def fitted_glue(sample: torch.Tensor, latents: torch.Tensor) -> Glue | None:
    """What turns a final sample into what the VAE was given then, if it is an arrangement, a scale and a shift."""
    for arrange in _arrangements(sample.shape, latents.shape):
        x = arrange(sample).float().transpose(0, 1).flatten(1)
        y = latents.float().transpose(0, 1).flatten(1)
        x_mean, y_mean = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        scale = ((x - x_mean) * (y - y_mean)).sum(1, keepdim=True) / ((x - x_mean) ** 2).sum(1, keepdim=True)
        shift = y_mean - scale * x_mean
        if (x * scale + shift - y).norm() <= _GLUE_ERROR * y.norm():
            return Glue(arrange, scale.flatten(), shift.flatten())
    return None


def _arrangements(sample: torch.Size, latents: torch.Size) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Ways from one shape to the other: an order of the axes, or tokens of patches put back in their places."""
    if len(sample) == len(latents):
        for order in permutations(range(1, len(sample))):
            if torch.Size([sample[0], *(sample[axis] for axis in order)]) == latents:
                yield functools.partial(torch.permute, dims=(0, *order))
    elif len(sample) == 3 and sample.numel() == latents.numel():
        batch, channels, height, width = latents[0], latents[1], latents[-2], latents[-1]
        frames = latents.numel() // (batch * channels * height * width)
        for side in (1, 2):
            if height % side or width % side or sample[2] != channels * side * side:
                continue
            grid = (batch, frames, height // side, width // side)
            for tokens, order in (
                ((*grid, channels, side, side), (0, 4, 1, 2, 5, 3, 6)),
                ((*grid, side, side, channels), (0, 6, 1, 2, 4, 3, 5)),
            ):
                yield functools.partial(_unpacked, tokens=tokens, order=order, shape=latents)


def _unpacked(
    sample: torch.Tensor, *, tokens: tuple[int, ...], order: tuple[int, ...], shape: torch.Size
) -> torch.Tensor:
    return sample.reshape(tokens).permute(order).reshape(shape)


def guessed_glue(vae: Any, sample: torch.Tensor) -> Glue | None:
    """Before a request of this geometry has finished: the sample is the VAE's input but for the config's scaling."""
    config = vae.config
    means, stds = config.get("latents_mean"), config.get("latents_std")
    num_channels = len(means) if means else config.get("latent_channels", config.get("z_dim"))
    if sample.ndim not in (4, 5) or sample.shape[1] != num_channels:
        return None
    if means and stds:
        return Glue(_as_it_is, torch.tensor(stds).to(sample.device), torch.tensor(means).to(sample.device))
    ones = torch.ones(sample.shape[1], device=sample.device)
    return Glue(_as_it_is, ones / (config.get("scaling_factor") or 1), ones * (config.get("shift_factor") or 0))


def _as_it_is(sample: torch.Tensor) -> torch.Tensor:
    return sample


@dataclass
class Previewer:
    """The previews of one rank: what is learned of each VAE and geometry, kept for the requests to come.

    :ivar borrowed: entered with a VAE that is run here.
    """

    borrowed: Callable[[Any], AbstractContextManager[None]] = nullcontext
    _rgb: dict[int, RgbMap | None] = field(default_factory=dict)
    _glue: dict[Geometry, Glue | None] = field(default_factory=dict)

    def watch(
        self, task: Task, bound: Any, real_vae: Any, num_previews: int, send: Callable[[int, torch.Tensor], None]
    ) -> None:
        """Send up to `num_previews` pictures (H, W, 3) with their step while a task denoises."""
        if num_previews == 0 or real_vae is None:
            return
        watched = _Watched(self, task, real_vae, num_previews, send)
        for scheduler in schedulers_of(bound):
            scheduler.step = WatchedStep(scheduler, functools.partial(watched.around_step, scheduler))
        decode = bound.vae.decode
        vars(bound.vae)["decode"] = functools.wraps(decode)(functools.partial(watched.around_decode, decode))

    def picture(self, vae: Any, geometry: Geometry, clean: torch.Tensor) -> torch.Tensor | None:
        """Predicted clean latents as RGB, uint8 (H, W, 3) on their device; of a video the frame in the middle.

        None: no map fits.
        """
        glue = self._glue[geometry] if geometry in self._glue else guessed_glue(vae, clean)
        rgb = self._rgb_of(vae)
        if glue is None or rgb is None:
            return None
        latents = glue(clean[:1])[0]
        if latents.ndim == 4:
            latents = latents[:, latents.shape[1] // 2]
        return to_uint8(rgb(latents) / 2 + 0.5)

    def learn(self, vae: Any, geometry: Geometry, sample: torch.Tensor, latents: torch.Tensor, decoded: Any) -> None:
        """A request was decoded: what its last sample had become, and the pixels (B, 3, [F,] H, W) in [-1, 1]."""
        if geometry not in self._glue:
            self._glue[geometry] = fitted_glue(sample[:1], latents[:1])
        rgb = self._rgb_of(vae)
        if rgb is not None and isinstance(decoded, torch.Tensor) and decoded.ndim == latents.ndim:
            rgb.learn(latents[:1], decoded[:1])

    def _rgb_of(self, vae: Any) -> RgbMap | None:
        if id(vae) not in self._rgb:
            try:
                with self.borrowed(vae):
                    self._rgb[id(vae)] = RgbMap(vae)
            except (AttributeError, NotImplementedError):
                self._rgb[id(vae)] = None
        return self._rgb[id(vae)]


class _Watched:
    """One task whose noise scheduler and VAE are watched."""

    def __init__(self, previewer: Previewer, task: Task, vae: Any, num_previews: int, send: Any) -> None:
        self._previewer = previewer
        self._task = task
        self._vae = vae
        self._num_previews = num_previews
        self._send = send
        self._last: torch.Tensor | None = None
        self._sent: set[int] = set()

    def around_step(self, scheduler: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        number = self._task.step + 1
        if number in steps_to_show(self._num_previews, self._task.num_steps) - self._sent:
            self._sent.add(number)
            # Some have further arguments between these.
            given = inspect.signature(step).bind(*args, **kwargs).arguments
            if {"model_output", "timestep", "sample"} <= given.keys():
                clean = predicted_clean(scheduler, given["model_output"], given["timestep"], given["sample"])
                self._show(number, clean)
        result = step(*args, **kwargs)
        self._last = result[0] if isinstance(result, tuple) else result.prev_sample
        return result

    def around_decode(self, decode: Callable[..., Any], latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = decode(latents, *args, **kwargs)
        if self._last is not None:
            self._previewer.learn(self._vae, self._geometry(self._last), self._last, latents, result[0])
        return result

    def _show(self, number: int, clean: torch.Tensor | None) -> None:
        picture = None if clean is None else self._previewer.picture(self._vae, self._geometry(clean), clean)
        if picture is not None:
            self._send(number, picture)

    def _geometry(self, sample: torch.Tensor) -> Geometry:
        return str(id(self._vae)), tuple(sample.shape)
