"""Interpolation and upscaling, through the engine."""

from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from diffusers.utils import BaseOutput
from pipelines import build
from safetensors.torch import save_file
from torch import nn

from engine.streams import completed, events_of, params_of
from sgld.config import EngineConfig
from sgld.engine.engine import Engine
from sgld.events import AnyEvent, Completed, Failed, Frames, Progress
from sgld.models import filters
from sgld.models.super_resolution import Compact
from sgld.sampling_params import SamplingParams
from sgld.testing import InlineReplica

CONFIG = EngineConfig(device="cpu")


@pytest.fixture(autouse=True)
def _nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "cached", lambda _repo, _name: None)


@pytest.fixture(scope="module")
def nearest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a network that repeats pixels."""
    network = Compact(width=4, num_layers=1, scale=2)
    for weight in network.body[-1].parameters():
        nn.init.zeros_(weight)
    path = tmp_path_factory.mktemp("weights") / "nearest.safetensors"
    save_file(network.state_dict(), path)
    return str(path)


class Vocoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def forward(self, sound: torch.Tensor) -> torch.Tensor:
        return self.weight * sound


class Output(BaseOutput):  # type: ignore[misc]
    """What `Films` returns."""

    frames: Any = None
    audio: Any = None


class Films(DiffusionPipeline):  # type: ignore[misc]
    """A bright square that moves, with sound, in `num_inference_steps` steps that do nothing."""

    sample_rate = 8000

    def __init__(self, vocoder: nn.Module, scheduler: EulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(vocoder=vocoder, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, prompt: str = "", num_frames: int = 3, num_inference_steps: int = 2, output_type: str = "pt"
    ) -> Output:
        with self.progress_bar(total=num_inference_steps) as bar:
            for _ in range(num_inference_steps):
                sound = self.vocoder(torch.zeros(1, 2, 800))
                bar.update()
        frames = torch.full((1, num_frames, 3, 16, 32), 0.2)
        for index in range(num_frames):
            frames[0, index, :, 4:12, 4 + 2 * index : 12 + 2 * index] = 0.8
        return Output(frames=frames, audio=sound)


@pytest.fixture
def films() -> Films:
    return Films(Vocoder(), EulerDiscreteScheduler())


def progress_of(events: list[AnyEvent], stage: str) -> list[tuple[int, int]]:
    return [(event.step, event.num_steps) for event in events if isinstance(event, Progress) and event.stage == stage]


async def test_video_has_more_and_larger_frames_and_its_sound(films: Films, nearest: str) -> None:
    params = SamplingParams(
        num_frames=3,
        fps=8,
        enable_frame_interpolation=True,
        frame_interpolation_exp=2,
        enable_upscaling=True,
        upscaling_model_path=nearest,
        upscaling_scale=2,
    )
    async with Engine(CONFIG, rank_factory=InlineReplica(films)) as engine:
        events = await events_of(engine, params)
        names = {call.name for call in engine.statistics().calls}
    end = events[-1]
    assert isinstance(end, Completed)
    assert (end.frames.shape, end.fps, end.is_video) == ((9, 32, 64, 3), 32, True)
    assert end.postprocessing == ("4x frames by optical flow", "2x size by SRVGG 2x (1 layers)")
    assert end.audio is not None
    assert end.audio.shape == (2, 800)
    # One pixel of the model's later, halfway between its first two frames.
    bright = end.frames[2, 16, :, 0] > 128
    assert (int(bright.argmax()), int(bright.sum())) == (10, 16)
    sent = [event for event in events if isinstance(event, Frames)]
    assert [event.index for event in sent] == list(range(9))
    np.testing.assert_array_equal(np.concatenate([event.frames for event in sent]), end.frames)
    assert progress_of(events, "denoise")[-1] == (2, 2)
    # Six frames are made in between, and nine enlarged.
    assert progress_of(events, "postprocess")[-1] == (15, 15)
    assert {"interpolator.decode", "upscaler.decode"} <= names


async def test_picture_is_enlarged_and_repeated_alike() -> None:
    pipeline, kwargs = build("qwen_image")
    plain = params_of(kwargs)
    larger = params_of(kwargs, enable_upscaling=True, upscaling_model_path="lanczos", upscaling_scale=3)
    async with Engine(CONFIG, rank_factory=InlineReplica(pipeline)) as engine:
        before = await completed(engine, plain)
        ends = [await completed(engine, larger) for _ in range(2)]
    _, height, width, channels = before.frames.shape
    assert ends[0].frames.shape == (1, 3 * height, 3 * width, channels)
    np.testing.assert_array_equal(ends[0].frames, ends[1].frames)
    assert abs(ends[0].frames.astype(float).mean() - before.frames.astype(float).mean()) < 1
    assert before.postprocessing == ()


async def test_streamed_frames_are_those_that_were_enlarged() -> None:
    """Of a VAE that decodes frame by frame, what it decodes isn't sent as it is."""
    pipeline, kwargs = build("wan")
    async with Engine(CONFIG, rank_factory=InlineReplica(pipeline)) as engine:
        before = await completed(engine, params_of(kwargs))
        events = await events_of(engine, params_of(kwargs, enable_upscaling=True, upscaling_model_path="lanczos"))
    end = events[-1]
    assert isinstance(end, Completed)
    num_frames, height, width, _ = before.frames.shape
    assert end.frames.shape == (num_frames, 4 * height, 4 * width, 3)
    sent = [event.frames for event in events if isinstance(event, Frames)]
    np.testing.assert_array_equal(np.concatenate(sent), end.frames)


async def test_pipeline_that_runs_whole_has_filters_too(films: Films, nearest: str) -> None:
    config = EngineConfig(device="cpu", backend="diffusers")
    params = SamplingParams(enable_upscaling=True, upscaling_model_path=nearest, upscaling_scale=2)
    async with Engine(config, rank_factory=InlineReplica(films)) as engine:
        end = await completed(engine, params)
    assert end.frames.shape == (3, 32, 64, 3)


@pytest.mark.parametrize("path", ["{}/missing.pth", "https://a.example/b.pth"])
async def test_wrong_weights_are_told_before_anything_is_computed(films: Films, path: str, tmp_path: Path) -> None:
    params = SamplingParams(enable_upscaling=True, upscaling_model_path=path.format(tmp_path))
    async with Engine(CONFIG, rank_factory=InlineReplica(films)) as engine:
        events = await events_of(engine, params)
        fine = await completed(engine, SamplingParams())
    assert isinstance(events[-1], Failed)
    assert events[-1].code == "invalid_request"
    assert "upscaling_model_path" in events[-1].message
    assert progress_of(events, "denoise") == []
    assert len(fine.frames) == 3


async def test_frames_that_become_too_large_are_refused_before_anything_is_computed() -> None:
    pipeline, kwargs = build("qwen_image")
    params = params_of(
        kwargs | {"height": 2048, "width": 2048},
        enable_upscaling=True,
        upscaling_model_path="lanczos",
        upscaling_scale=8,
    )
    async with Engine(CONFIG, rank_factory=InlineReplica(pipeline)) as engine:
        events = await events_of(engine, params)
    assert isinstance(events[-1], Failed)
    assert events[-1].code == "invalid_request"
    assert "choose a smaller upscaling_scale" in events[-1].message
    assert not any(isinstance(event, Progress) for event in events)


async def test_steps_of_others_run_between_frames(films: Films) -> None:
    """A long video doesn't hold up a request that comes while its frames are made."""
    long = SamplingParams(num_frames=30, enable_frame_interpolation=True, frame_interpolation_exp=2)
    ends: list[str] = []
    async with Engine(CONFIG, rank_factory=InlineReplica(films)) as engine:

        async def run(name: str, params: SamplingParams, started: anyio.Event | None = None) -> None:
            async for event in engine.generate(params):
                if isinstance(event, Progress) and event.stage == "postprocess" and started is not None:
                    started.set()
                if isinstance(event, Completed):
                    ends.append(name)

        async with anyio.create_task_group() as tasks:
            begun = anyio.Event()
            tasks.start_soon(run, "long", long, begun)
            await begun.wait()
            await run("short", SamplingParams(num_inference_steps=4))
    assert ends == ["short", "long"]


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [2, 3])
async def test_on_a_gpu_frames_are_nearly_those_of_the_cpu(films: Films, nearest: str, scale: int) -> None:
    """Networks run in fp16 there."""
    params = SamplingParams(
        enable_frame_interpolation=True, enable_upscaling=True, upscaling_model_path=nearest, upscaling_scale=scale
    )
    ends = []
    for device in ("cpu", "cuda"):
        replica = InlineReplica(films.to(device))
        async with Engine(EngineConfig(device=device), rank_factory=replica) as engine:
            ends.append((await completed(engine, params)).frames.astype(int))
    assert ends[0].shape == (5, 16 * scale, 32 * scale, 3)
    assert abs(ends[0] - ends[1]).max() <= 2
