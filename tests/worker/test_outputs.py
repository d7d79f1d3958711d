from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.modular_pipelines import PipelineState
from diffusers.utils import BaseOutput
from engine.streams import params_of, plain
from pipelines import build
from torch import nn

from sgld.errors import PipelineFailed
from sgld.worker.arguments import arguments
from sgld.worker.outputs import outputs_of, sample_rate_of

PICTURES = torch.rand(1, 3, 4, 6)
VIDEO = torch.rand(1, 5, 3, 4, 6)
SOUND = torch.linspace(-1, 1, 10).repeat(1, 2, 1)


class Result(BaseOutput):  # type: ignore[misc]
    """What pipelines return."""

    frames: Any = None
    audio: Any = None


@pytest.mark.parametrize(
    ("result", "is_video"),
    [
        (SimpleNamespace(images=PICTURES), False),
        (SimpleNamespace(image=PICTURES), False),
        (SimpleNamespace(prediction=PICTURES), False),
        (SimpleNamespace(frames=VIDEO), True),
        (SimpleNamespace(frames=VIDEO[0], c2w=np.eye(4)), True),
        (SimpleNamespace(images=VIDEO), False),
        (Result(frames=VIDEO), True),
        ((PICTURES, "a second result"), False),
        ((VIDEO, None), True),
        (VIDEO, True),
        ([PICTURES[0]], False),
    ],
)
def test_pictures_and_videos_are_found_by_their_names(result: Any, is_video: bool) -> None:
    outputs = outputs_of(result)
    assert outputs.pixels is not None
    assert (outputs.pixels.is_video, outputs.audio) == (is_video, None)


def test_state_of_a_modular_pipeline_is_read() -> None:
    state = PipelineState()
    state.set("latents", torch.rand(1, 4, 8, 8))
    state.set("videos", VIDEO)
    pixels = outputs_of(state).pixels
    assert pixels is not None
    assert pixels.is_video


@pytest.mark.parametrize(
    "audio",
    [
        SOUND,
        SOUND.numpy(),
        SOUND.double(),
        SOUND.repeat(2, 1, 1),
        [SOUND[0]],
    ],
)
def test_sound_is_that_of_the_first_sample(audio: Any) -> None:
    outputs = outputs_of(Result(frames=VIDEO, audio=audio))
    assert outputs.pixels is not None
    assert outputs.audio is not None
    assert outputs.audio.dtype == np.float32
    np.testing.assert_array_equal(outputs.audio, SOUND[0].numpy())


def test_sound_alone_is_a_result() -> None:
    outputs = outputs_of(SimpleNamespace(audios=SOUND[:, 0].numpy()))
    assert outputs.pixels is None
    assert outputs.audio is not None
    assert outputs.audio.shape == (1, 10)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (SimpleNamespace(), "it is a SimpleNamespace"),
        (SimpleNamespace(images=None), "it is a SimpleNamespace"),
        (SimpleNamespace(images=[]), "it holds images"),
        (SimpleNamespace(images=torch.ones(1, 9, 8, 8), texts=["a"]), "it holds images, texts"),
        (SimpleNamespace(audios=["a"]), "it holds audios"),
        (SimpleNamespace(latents=torch.ones(1, 4, 8, 8)), "it holds latents"),
        ((), "it is a tuple"),
        ("text", "it is a str"),
        (None, "it is a NoneType"),
    ],
)
def test_result_without_pictures_and_sound_is_refused_by_its_fields(result: Any, message: str) -> None:
    with pytest.raises(PipelineFailed, match=f"neither pictures nor sound: {message}"):
        outputs_of(result)


class Vocoder(nn.Module):
    def __init__(self, **config: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)


@pytest.mark.parametrize(
    ("pipeline", "rate"),
    [
        (SimpleNamespace(vocoder=Vocoder(output_sampling_rate=24000), vae=Vocoder(sample_rate=16000)), 24000),
        (SimpleNamespace(vocoder=Vocoder(sampling_rate=16000)), 16000),
        (SimpleNamespace(vae=Vocoder(sampling_rate=44100)), 44100),
        (SimpleNamespace(sample_rate=48000, vae=Vocoder()), 48000),
        (SimpleNamespace(vocoder=None, vae=Vocoder()), None),
    ],
)
def test_sample_rate_is_what_the_models_tell(pipeline: Any, rate: int | None) -> None:
    assert sample_rate_of(pipeline) == rate


@pytest.mark.parametrize("name", ["sd", "wan", "kandinsky"])
@pytest.mark.filterwarnings("ignore:.callback_steps. is deprecated")
def test_what_comes_out_is_what_the_pipeline_shows(name: str) -> None:
    """Kandinsky's has tensors of its decoder's range, and makes pictures of these itself."""
    pipeline, kwargs = build(name)
    params = params_of(kwargs, seed=1)
    outputs = outputs_of(pipeline(**arguments(pipeline, params, {}, [])))
    assert outputs.pixels is not None
    wanted = plain(pipeline, params)
    assert len(set(wanted.ravel())) > 2
    np.testing.assert_allclose(outputs.pixels.frames.cpu().numpy().astype(int), wanted.astype(int), atol=1)
