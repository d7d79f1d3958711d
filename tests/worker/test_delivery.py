"""What a task shows."""

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pipelines import build

from sgld.errors import InvalidRequest
from sgld.messages import Start
from sgld.models.load import LoadedModel
from sgld.request import Limits
from sgld.sampling_params import SamplingParams
from sgld.worker.delivery import Delivery
from sgld.worker.preview import Previewer
from sgld.worker.task import Task


class Sent:
    """The results of a task: the indexes of its frames."""

    max_frame_bytes = 10**6

    def __init__(self) -> None:
        self.indexes: list[int] = []

    def frames(self, _request_id: str, index: int, _frames: torch.Tensor, *, is_video: bool) -> None:
        assert is_video
        self.indexes.append(index)


@torch.no_grad()
def test_frames_of_a_decode_that_runs_again_replace_those_of_the_first() -> None:
    pipeline, _ = build("wan")
    sent, latents = Sent(), torch.randn(1, 16, 2, 2, 2)
    model = LoadedModel(pipeline, torch.device("cpu"), {}, "wan")
    delivery = Delivery(sent, Start(request_id="a", params=SamplingParams()), model, Previewer(), num_threads=1)  # type: ignore[arg-type]
    delivery._video_processor = pipeline.video_processor

    def decode(problem: Exception | None = None) -> None:
        with delivery._streaming(pipeline.vae):
            pipeline.vae.decode(latents)
            if problem is not None:
                raise problem

    with pytest.raises(torch.OutOfMemoryError):
        decode(torch.OutOfMemoryError())
    decode()
    assert sent.indexes == [0, 1, 0, 1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_steps_of_noise_schedulers_are_answered_from_the_host_on_a_gpu(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
    monkeypatch.setattr("sgld.worker.delivery.answer_from_host", watched.append)
    model, bound = LoadedModel(None, torch.device(device), {}, "any"), SimpleNamespace()
    delivery = Delivery(Sent(), Start(request_id="a", params=SamplingParams()), model, Previewer(), num_threads=1)  # type: ignore[arg-type]
    delivery.prepare(Task("a", lambda _task: None), bound)
    assert watched == ([bound] if device == "cuda" else [])


class Filtering:
    """Stands for filters: sees what is alive while they work."""

    def __init__(self, result: "weakref.ref[object]") -> None:
        self._result = result

    def frames(self, frames: torch.Tensor, *, is_video: bool, max_bytes: int) -> Iterator[torch.Tensor]:
        assert is_video
        assert self._result() is None
        yield frames[:max_bytes]


class Film:
    """What a pipeline returned."""

    def __init__(self) -> None:
        self.frames = torch.zeros(1, 2, 3, 4, 4)


def test_what_the_pipeline_returned_is_gone_while_filters_work() -> None:
    sent = Sent()
    model = LoadedModel(None, torch.device("cpu"), {}, "film")
    delivery = Delivery(sent, Start(request_id="a", params=SamplingParams()), model, Previewer(), num_threads=1)  # type: ignore[arg-type]

    def film() -> Film:
        made = Film()
        delivery._postprocessing = Filtering(weakref.ref(made))  # type: ignore[assignment]
        return made

    delivery.finish(film)
    assert sent.indexes == [0]


@pytest.mark.parametrize(
    ("chosen", "limits"),
    [
        ({}, Limits(max_pixels=11)),
        ({"enable_upscaling": True, "upscaling_scale": 2}, Limits(max_pixels=47)),
        ({"enable_frame_interpolation": True}, Limits(max_frames=2)),
    ],
)
def test_what_the_model_chose_is_within_the_limits_too(chosen: dict[str, Any], limits: Limits) -> None:
    model, sent = LoadedModel(None, torch.device("cpu"), {}, "film"), Sent()
    asked = Start(request_id="a", params=SamplingParams(**chosen), limits=limits)
    with pytest.raises(InvalidRequest, match="at most"):
        Delivery(sent, asked, model, Previewer(), num_threads=1).finish(Film)  # type: ignore[arg-type]
    assert sent.indexes == []
