"""Results that are no plain pictures, through the engine."""

from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from diffusers.utils import BaseOutput
from pipelines import build
from torch import nn

from engine.streams import PROMPT, completed, events_of, params_of
from sgld.config import EngineConfig
from sgld.engine.engine import Engine
from sgld.events import Failed, Progress
from sgld.sampling_params import SamplingParams
from sgld.testing import InlineReplica

CONFIG = EngineConfig(device="cpu")


class Vocoder(nn.Module):
    def __init__(self, rate: int | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.5))
        self.config = SimpleNamespace(sampling_rate=rate)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def forward(self, sound: torch.Tensor) -> torch.Tensor:
        return self.weight * sound


class Output(BaseOutput):  # type: ignore[misc]
    """What `Sounding` returns."""

    frames: Any = None
    audio: Any = None
    texts: Any = None


class Sounding(DiffusionPipeline):  # type: ignore[misc]
    """Returns the parts that its prompt names."""

    def __init__(self, vocoder: nn.Module) -> None:
        super().__init__()
        self.register_modules(vocoder=vocoder)

    @torch.no_grad()
    def __call__(self, prompt: str = "", num_samples: int = 1000, output_type: str = "pt") -> Output:
        sound = torch.linspace(-2, 2, 2 * num_samples).reshape(1, 2, num_samples)
        parts = {"frames": torch.ones(1, 4, 3, 8, 8), "audio": self.vocoder(sound), "texts": ["a"]}
        return Output(**{name: parts[name] for name in prompt.split()})


def sound_of(num_samples: int) -> Any:
    return torch.linspace(-1, 1, 2 * num_samples).reshape(2, num_samples).numpy()


@pytest.mark.parametrize("num_samples", [1000, 9_000_000])
async def test_video_comes_with_its_sound(num_samples: int) -> None:
    params = SamplingParams(prompt="frames audio", diffusers_kwargs={"num_samples": num_samples})
    async with Engine(CONFIG, rank_factory=InlineReplica(Sounding(Vocoder(24_000)))) as engine:
        end = await completed(engine, params)
    assert (end.frames.shape, end.is_video, end.sample_rate) == ((4, 8, 8, 3), True, 24_000)
    assert end.audio is not None
    assert end.audio.dtype == np.float32
    np.testing.assert_array_equal(end.audio, sound_of(num_samples))


async def test_sound_alone_has_no_frames() -> None:
    async with Engine(CONFIG, rank_factory=InlineReplica(Sounding(Vocoder(16_000)))) as engine:
        end = await completed(engine, SamplingParams(prompt="audio"))
    assert (end.frames.shape, end.is_video, end.sample_rate) == ((0, 0, 0, 3), False, 16_000)
    assert end.audio is not None


@pytest.mark.parametrize(
    ("prompt", "message"), [("texts", "neither pictures nor sound: it holds texts"), ("audio", "tell the sample rate")]
)
async def test_result_that_can_not_be_given_fails_with_the_reason(prompt: str, message: str) -> None:
    async with Engine(CONFIG, rank_factory=InlineReplica(Sounding(Vocoder(None)))) as engine:
        event = (await events_of(engine, SamplingParams(prompt=prompt)))[-1]
    assert isinstance(event, Failed)
    assert event.code == "pipeline_failed"
    assert message in event.message


class Barless(DiffusionPipeline):  # type: ignore[misc]
    """Steps without a progress bar and without callbacks."""

    def __init__(self, vocoder: nn.Module, scheduler: EulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(vocoder=vocoder, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt: str = "", num_inference_steps: int = 5, output_type: str = "pt") -> Output:
        self.scheduler.set_timesteps(num_inference_steps)
        sample = torch.ones(1, 3, 8, 8)
        for timestep in self.scheduler.timesteps:
            sample = self.scheduler.step(self.vocoder(sample), timestep, sample).prev_sample
        return Output(frames=sample[None])


async def test_pipeline_without_a_progress_bar_has_progress() -> None:
    pipeline = Barless(Vocoder(None), EulerDiscreteScheduler())
    async with Engine(CONFIG, rank_factory=InlineReplica(pipeline)) as engine:
        events = await events_of(engine, SamplingParams(num_inference_steps=4))
    told = [(event.step, event.num_steps) for event in events if isinstance(event, Progress)]
    assert told
    assert told[-1] == (4, 4)
    assert told == sorted(told)


async def test_a_picture_of_16_bits_is_what_the_pipeline_computed() -> None:
    pipeline, kwargs = build("sdxl")
    params = params_of(kwargs, bit_depth=16)
    async with Engine(CONFIG, rank_factory=InlineReplica(build("sdxl")[0])) as engine:
        end = await completed(engine, params)
        usual = await completed(engine, msgspec.structs.replace(params, bit_depth=8))
    generator = torch.Generator("cpu").manual_seed(params.seed)
    given = {**kwargs, "prompt": PROMPT, "num_inference_steps": 3}
    expected = pipeline(**given, generator=generator, output_type="np").images
    assert (str(end.frames.dtype), end.frames.shape) == ("uint16", usual.frames.shape)
    assert np.abs(end.frames.astype(int) - (expected * 65535).round().astype(int)).max() <= 2
    assert len(np.unique(end.frames)) > 256
    assert np.abs(end.frames / 257 - usual.frames).max() <= 0.51


async def test_16_bits_are_refused_where_there_are_8() -> None:
    pipeline, kwargs = build("sdxl")
    pipeline.vae.to(torch.bfloat16)
    async with Engine(CONFIG, rank_factory=InlineReplica(pipeline)) as engine:
        end = (await events_of(engine, params_of(kwargs, bit_depth=16)))[-1]
    assert isinstance(end, Failed)
    assert end.message == (
        "bit_depth is 16, but the VAE has bf16, which is 8 bits; start with --vae-precision fp32 or fp16"
    )
