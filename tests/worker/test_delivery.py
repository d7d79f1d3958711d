"""What a task shows."""

import pytest
import torch
from pipelines import build

from sgld.models.load import LoadedModel
from sgld.sampling_params import SamplingParams
from sgld.worker.delivery import Delivery
from sgld.worker.preview import Previewer


class Sent:
    """The results of a task: the indexes of its frames."""

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
    delivery = Delivery(sent, "a", model, Previewer(), SamplingParams(), 1)  # type: ignore[arg-type]
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
