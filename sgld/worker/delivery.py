"""What one task shows while it runs and in the end: previews, frames as they are decoded, the rest, and sound."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sgld.errors import PipelineFailed
from sgld.messages import Start
from sgld.models.filters import Filter
from sgld.outcome import on_failure
from sgld.worker.host_values import answer_from_host
from sgld.worker.outputs import outputs_of, sample_rate_of
from sgld.worker.pixels import Pixels, to_uint8
from sgld.worker.postprocess import Postprocessing
from sgld.worker.preview import Previewer
from sgld.worker.proxy import enter_around, real_of
from sgld.worker.results import Results
from sgld.worker.runtime import Runtime
from sgld.worker.steps import count_steps, shift_noise
from sgld.worker.streaming import can_stream, streamed
from sgld.worker.task import Task

if TYPE_CHECKING:
    from sgld.models.load import LoadedModel


class Delivery:
    """Sends what one task shows while it runs and in the end.

    :param num_threads: CPU threads of the task.
    :param filters: what its frames go through.
    """

    def __init__(
        self,
        results: Results,
        asked: Start,
        model: "LoadedModel",
        previewer: Previewer,
        *,
        num_threads: int,
        filters: tuple[Filter, ...] = (),
        runtime: Runtime | None = None,
    ) -> None:
        self._results = results
        self._request_id, self._params, self._limits = asked.request_id, asked.params, asked.limits
        self._model = model
        self._previewer = previewer
        self._num_threads = num_threads
        self._filters = filters
        self._runtime = runtime or Runtime()
        self._video_processor: Any = None
        self._sample_rate: int | None = None
        self._streamed: list[torch.Tensor] = []
        self._postprocessing: Postprocessing | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to the frames after the pipeline."""
        return self._postprocessing.notes if self._postprocessing is not None else ()

    def prepare(self, task: Task, bound: Any) -> None:
        """In the task's thread, before its pipeline runs."""
        # The executor has the cores; a pool of threads for each task would fight for them.
        torch.set_num_threads(self._num_threads)
        if self._model.device.type == "cuda":
            torch.cuda.set_device(self._model.device)
        if self._params.flow_shift is not None:
            shift_noise(bound, self._params.flow_shift)
        if self._model.device.type == "cuda":
            answer_from_host(bound)
        if self._filters:
            self._postprocessing = self._prepared_filters(task, self._filters)
        self._sample_rate = sample_rate_of(bound)
        count_steps(task, bound)
        if (vae := getattr(bound, "vae", None)) is not None:
            self._watch(task, bound, vae)

    def _prepared_filters(self, task: Task, filters: tuple[Filter, ...]) -> Postprocessing:
        """What happens to the frames; where their size is known, see before anything is computed that it can be."""
        postprocessing = Postprocessing(task, self._params, filters, self._model.device, self._runtime)
        if self._params.height and self._params.width:
            limit = self._results.max_frame_bytes
            postprocessing.check_size(self._params.height, self._params.width, max_bytes=limit)
        return postprocessing

    def _watch(self, task: Task, bound: Any, vae: Any) -> None:
        """Show previews, and frames as they are decoded."""
        real = real_of(vae)
        if self._params.bit_depth == 16 and getattr(real, "dtype", None) is torch.bfloat16:
            raise PipelineFailed(
                "bit_depth is 16, but the VAE has bf16, which is 8 bits; start with --vae-precision fp32 or fp16"
            )
        self._previewer.watch(task, bound, real, self._params.num_previews, self._preview)
        self._video_processor = getattr(bound, "video_processor", None)
        is_plain = not self._filters and self._params.bit_depth == 8
        if can_stream(real) and self._video_processor is not None and is_plain:
            enter_around(vae, "decode", lambda: self._streaming(real))

    def finish(self, run: Callable[[], Any]) -> None:
        """In the task's thread: run the pipeline, and send what wasn't sent while it was decoded."""
        # Filters take long, and the result is four times as large as its pixels: no frame here holds it.
        outputs = outputs_of(run(), self._params.bit_depth)
        if outputs.pixels is not None:
            # What nobody named is known only now.
            num_frames, height, width, _ = outputs.pixels.frames.shape
            num_frames = num_frames if outputs.pixels.is_video else 1
            self._limits.check(self._params, num_frames=num_frames, size=(width, height))
        if outputs.audio is not None:
            self._send_audio(outputs.audio)
        if outputs.pixels is not None and self._postprocessing is not None:
            self._send_processed(outputs.pixels, self._postprocessing)
        elif outputs.pixels is not None:
            self._send_rest(outputs.pixels)

    def _send_audio(self, samples: NDArray[np.float32]) -> None:
        if self._sample_rate is None:
            raise PipelineFailed("the pipeline returned sound, but neither it nor its models tell the sample rate")
        self._results.audio(self._request_id, samples, self._sample_rate)

    def _send_processed(self, pixels: Pixels, postprocessing: Postprocessing) -> None:
        """Each frame leaves as soon as it is done, so that there are few of them."""
        is_video = pixels.is_video
        done = postprocessing.frames(pixels.frames, is_video=is_video, max_bytes=self._results.max_frame_bytes)
        for index, frame in enumerate(done):
            self._results.frames(self._request_id, index, frame, is_video=is_video)

    def _send_rest(self, pixels: Pixels) -> None:
        sent = torch.cat(self._streamed) if self._streamed else pixels.frames[:0]
        if len(sent) > len(pixels.frames) or not torch.equal(sent, pixels.frames[: len(sent)]):
            # The pipeline did more with what was decoded than its processor does: these are the right frames.
            sent = pixels.frames[:0]
        if len(sent) < len(pixels.frames):
            rest = pixels.frames[len(sent) :]
            self._results.frames(self._request_id, len(sent), rest, is_video=pixels.is_video)

    def _preview(self, step: int, picture: torch.Tensor) -> None:
        self._results.preview(self._request_id, step, picture)

    @contextmanager
    def _streaming(self, vae: Any) -> Iterator[None]:
        """Around a decode. One that fails for want of memory runs again: its frames replace those that were sent."""
        before = list(self._streamed)

        def forget() -> None:
            self._streamed = before

        with on_failure(forget), streamed(vae, self._stream):
            yield

    def _stream(self, samples: torch.Tensor) -> None:
        """In the executor's thread: frames that were just decoded, (B, 3, F, H, W) in [-1, 1]."""
        video = self._video_processor.postprocess_video(samples, output_type="pt")
        frames = to_uint8(video[0].permute(0, 2, 3, 1))
        index = sum(len(part) for part in self._streamed)
        self._streamed.append(frames)
        self._results.frames(self._request_id, index, frames, is_video=True)
