from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import CogVideoXDPMScheduler, FluxPipeline
from pipelines import TEN, build
from torch import nn

from sgld.worker.binding import bind
from sgld.worker.preview import (
    Previewer,
    fitted_glue,
    guessed_glue,
    predicted_clean,
    steps_to_show,
)
from sgld.worker.task import Task
from worker.requests import picture, request, run_to_end, running

NUM_STEPS = 10


@pytest.mark.parametrize(
    ("num_previews", "num_steps", "steps"),
    [
        (0, 10, set()),
        (1, 10, {5}),
        (3, 8, {2, 4, 6}),
        (9, 10, set(range(1, 10))),
        (50, 4, {1, 2, 3}),
        (3, 1, set()),
        (3, 0, set()),
    ],
)
def test_previews_are_spread_over_the_steps_but_the_last(num_previews: int, num_steps: int, steps: set[int]) -> None:
    assert steps_to_show(num_previews, num_steps) == steps


@pytest.mark.parametrize("num_steps", range(2, 60))
def test_as_many_previews_as_asked_for(num_steps: int) -> None:
    for num_previews in range(num_steps):
        steps = steps_to_show(num_previews, num_steps)
        assert len(steps) == num_previews
        assert all(1 <= step < num_steps for step in steps)


def noise() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 4, 8, 8, generator=generator).clamp(-1, 1), torch.randn(1, 4, 8, 8, generator=generator)


def predicted(prediction: str, signal: Any, sigma: Any) -> torch.Tensor:
    """What a perfect model says of signal·clean + sigma·noise."""
    clean, eps = noise()
    kinds: dict[str, torch.Tensor] = {"epsilon": eps, "v_prediction": signal * eps - sigma * clean, "sample": clean}
    return kinds[prediction]


def check_clean(scheduler: Any, index: int, model_output: torch.Tensor, sample: torch.Tensor) -> None:
    found = predicted_clean(scheduler, model_output, scheduler.timesteps[index], sample)
    torch.testing.assert_close(found, noise()[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("index", [0, 4, 8])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}),
        ("DEISMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    ],
)
def test_clean_latents_of_flows(name: str, config: dict[str, Any], index: int) -> None:
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(NUM_STEPS)
    clean, eps = noise()
    sigma = scheduler.sigmas[index]
    check_clean(scheduler, index, eps - clean, (1 - sigma) * clean + sigma * eps)


@pytest.mark.parametrize("index", [0, 4, 8])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DDPMScheduler", "LCMScheduler", "PNDMScheduler", "CogVideoXDDIMScheduler"]
)
def test_clean_latents_where_the_variance_is_kept(name: str, prediction: str, index: int) -> None:
    scheduler = getattr(diffusers, name)(prediction_type=prediction)
    scheduler.set_timesteps(NUM_STEPS)
    clean, eps = noise()
    alpha = scheduler.alphas_cumprod[int(scheduler.timesteps[index])]
    signal, sigma = alpha**0.5, (1 - alpha) ** 0.5
    check_clean(scheduler, index, predicted(prediction, signal, sigma), signal * clean + sigma * eps)


@pytest.mark.parametrize("index", [0, 4, 8])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"])
def test_clean_latents_where_noise_is_added(name: str, prediction: str, index: int) -> None:
    scheduler = getattr(diffusers, name)(prediction_type=prediction)
    scheduler.set_timesteps(NUM_STEPS)
    clean, eps = noise()
    sigma = scheduler.sigmas[index]
    if name == "HeunDiscreteScheduler":  # two entries for each step
        sigma = scheduler.sigmas[scheduler.index_for_timestep(scheduler.timesteps[index])]
    signal = 1 / (1 + sigma**2) ** 0.5
    check_clean(scheduler, index, predicted(prediction, signal, sigma * signal), clean + sigma * eps)


@pytest.mark.parametrize("index", [0, 4, 8])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {"predict_x0": False}),
        ("DEISMultistepScheduler", {}),
        ("SASolverScheduler", {}),
    ],
)
def test_clean_latents_of_solvers(name: str, config: dict[str, Any], prediction: str, index: int) -> None:
    scheduler = getattr(diffusers, name)(prediction_type=prediction, **config)
    scheduler.set_timesteps(NUM_STEPS)
    clean, eps = noise()
    at = index if not config.get("use_karras_sigmas") else 0
    signal, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[at])
    check_clean(scheduler, at, predicted(prediction, signal, sigma), signal * clean + sigma * eps)


def test_clean_latents_of_a_preconditioned_model() -> None:
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.5)
    scheduler.set_timesteps(NUM_STEPS)
    clean, eps = noise()
    sigma, data = scheduler.sigmas[4], 0.5
    sample = clean + sigma * eps
    skip, out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2) ** 0.5
    check_clean(scheduler, 4, (clean - skip * sample) / out, sample)


def test_unknown_noise_scheduler_has_no_preview() -> None:
    scheduler = SimpleNamespace(config={})
    assert predicted_clean(scheduler, *(torch.ones(1, 2, 3, 3),) * 3) is None


def test_asking_does_not_change_what_the_noise_scheduler_does() -> None:
    clean, eps = noise()
    results = []
    for is_asked in (True, False):
        scheduler = diffusers.UniPCMultistepScheduler()
        scheduler.set_timesteps(NUM_STEPS)
        sample = clean
        for t in scheduler.timesteps:
            if is_asked:
                predicted_clean(scheduler, eps, t, sample)
            sample = scheduler.step(eps, t, sample).prev_sample
        results.append(sample)
    assert torch.equal(*results)


SCALE, SHIFT = torch.tensor([2.0, 0.5, -1.0, 3.0]), torch.tensor([0.1, -1.0, 0.0, 2.0])


def scaled(latents: torch.Tensor) -> torch.Tensor:
    shape = (1, 4, *(1,) * (latents.ndim - 2))
    return latents * SCALE.reshape(shape) + SHIFT.reshape(shape)


@pytest.mark.parametrize("shape", [(1, 4, 8, 6), (1, 4, 3, 8, 6)])
def test_glue_of_a_scale_and_a_shift(shape: tuple[int, ...]) -> None:
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    glue = fitted_glue(sample, scaled(sample))
    assert glue is not None
    torch.testing.assert_close(glue.scale, SCALE)
    torch.testing.assert_close(glue.shift, SHIFT, atol=1e-6, rtol=1e-5)
    other = torch.randn(shape)
    torch.testing.assert_close(glue(other), scaled(other))


def test_glue_of_packed_tokens() -> None:
    latents = torch.randn(1, 4, 8, 6)
    glue = fitted_glue(FluxPipeline._pack_latents(latents, 1, 4, 8, 6), scaled(latents))
    assert glue is not None
    other = torch.randn(1, 4, 8, 6)
    torch.testing.assert_close(glue(FluxPipeline._pack_latents(other, 1, 4, 8, 6)), scaled(other))


def test_glue_of_video_tokens() -> None:
    latents = torch.randn(1, 4, 3, 8, 6)
    glue = fitted_glue(diffusers.LTXPipeline._pack_latents(latents, 1, 1), scaled(latents))
    assert glue is not None
    torch.testing.assert_close(glue(diffusers.LTXPipeline._pack_latents(latents, 1, 1)), scaled(latents))


def test_glue_of_another_order_of_axes() -> None:
    """CogVideoX has its frames before its channels."""
    sample = torch.randn(1, 3, 4, 8, 6)
    glue = fitted_glue(sample, scaled(sample.permute(0, 2, 1, 3, 4)))
    assert glue is not None
    torch.testing.assert_close(glue(sample), scaled(sample.permute(0, 2, 1, 3, 4)))


@pytest.mark.parametrize("shape", [(1, 4, 8, 6), (1, 4, 6, 8), (1, 2, 8, 6), (1, 48, 4)])
def test_what_is_no_arrangement_scale_and_shift_is_no_glue(shape: tuple[int, ...]) -> None:
    assert fitted_glue(torch.randn(shape), torch.randn(1, 4, 8, 6)) is None


def test_guess_undoes_the_scaling_of_the_configuration() -> None:
    sample = torch.ones(1, 2, 3, 3)
    glue = guessed_glue(
        SimpleNamespace(config={"latent_channels": 2, "scaling_factor": 0.5, "shift_factor": 1}), sample
    )
    assert glue is not None
    assert torch.equal(glue(sample), torch.full_like(sample, 3.0))
    config = {"latents_mean": [1.0, 2.0], "latents_std": [3.0, 4.0], "z_dim": 2}
    glue = guessed_glue(SimpleNamespace(config=config), sample)
    assert glue is not None
    assert glue(sample)[0, :, 0, 0].tolist() == [4.0, 6.0]


@pytest.mark.parametrize("sample", [torch.ones(1, 16, 4), torch.ones(1, 3, 4, 4)])
def test_nothing_is_guessed_of_packed_or_other_latents(sample: torch.Tensor) -> None:
    assert guessed_glue(SimpleNamespace(config={"latent_channels": 2}), sample) is None


class LinearVae(nn.Module):
    """Its latents are a linear map of the pixels, averaged over squares of 4."""

    spatial_compression_ratio = 4

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0], [0.0, 0.3, 1.0], [1.0, 1.0, 0.0]]))
        self.config = {"latent_channels": 4, "scaling_factor": 1.0}

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        small = nn.functional.avg_pool2d(x, 4)
        return (torch.einsum("bchw,lc->blhw", small, self.mix) + 0.25,)


def test_picture_of_clean_latents() -> None:
    vae = LinearVae()
    pixels = torch.rand(1, 3, 6, 5)
    latents = torch.einsum("bchw,lc->blhw", pixels * 2 - 1, vae.mix) + 0.25
    found = Previewer().picture(vae, ("vae", tuple(latents.shape)), latents)
    assert found is not None
    assert found.shape == (6, 5, 3)
    assert found.dtype == torch.uint8
    assert (found.int() - (pixels[0].permute(1, 2, 0) * 255).round().int()).abs().max() <= 1


def test_vae_without_an_encoder_has_no_picture() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.config = SimpleNamespace(get={"latent_channels": 4}.get, block_out_channels=(1, 1))

    assert Previewer().picture(Decoder(), ("vae", (1, 4, 2, 2)), torch.ones(1, 4, 2, 2)) is None


def watched(pipeline: Any, kwargs: dict[str, Any], previewer: Previewer, num_previews: int) -> tuple[Any, list[Any]]:
    """Run a request with previews; what it returned, and the steps and pictures that were sent."""
    sent: list[Any] = []

    def body(task: Task) -> Any:
        bound = bind(pipeline, task)
        previewer.watch(task, bound, pipeline.vae, num_previews, lambda step, shown: sent.append((step, shown)))
        return bound(**kwargs)

    return run_to_end(running(body)), sent


@pytest.mark.parametrize("name", TEN)
def test_previews_are_sent_and_change_nothing(name: str) -> None:
    pipeline, kwargs = build(name)
    previewer = Previewer()
    plain = picture(pipeline(**request(name, 1, kwargs)))
    for _ in range(2):
        result, sent = watched(pipeline, request(name, 1, kwargs), previewer, num_previews=2)
        assert torch.equal(picture(result), plain)
    # By the second request of a geometry the way from the samples to the VAE is learned.
    assert [step for step, _ in sent] == [1, 3]
    assert all(shown.ndim == 3 and shown.shape[2] == 3 for _, shown in sent)


def test_no_previews_are_sent_where_none_are_wanted() -> None:
    pipeline, kwargs = build("sdxl")
    assert watched(pipeline, request("sdxl", 0, kwargs), Previewer(), num_previews=0)[1] == []


def test_noise_scheduler_with_further_arguments_is_previewed() -> None:
    """That of CogVideoX-5b takes five, and its sample last."""
    pipeline, kwargs = build("cogvideox")
    pipeline.scheduler = CogVideoXDPMScheduler()
    plain = picture(pipeline(**request("cogvideox", 1, kwargs)))
    previewer = Previewer()
    for _ in range(2):
        result, sent = watched(pipeline, request("cogvideox", 1, kwargs), previewer, num_previews=2)
        assert torch.equal(picture(result), plain)
    assert [step for step, _ in sent] == [1, 3]
