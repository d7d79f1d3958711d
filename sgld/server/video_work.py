"""The files of one video for them: encoded and kept, with small pictures of it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from anyio.to_thread import run_sync

from sgld.errors import PipelineFailed
from sgld.events import Completed
from sgld.media.animations import MAX_GIF_PIXELS, write_animation
from sgld.media.files import extension_of, media_type_of
from sgld.media.hook import hooked, load_hook
from sgld.media.thumbnails import small, spritesheet
from sgld.media.videos import video_writer
from sgld.request import Limits
from sgld.sampling_params import DEFAULT_FPS
from sgld.server.job_store import Job, StoredFile
from sgld.server.metadata import metadata_of
from sgld.server.requests import LiveRequest
from sgld.server.services import Services
from sgld.server.video_schemas import VideoOptions

VARIANTS = {"thumbnail": ("-thumbnail.webp", "image/webp"), "spritesheet": ("-spritesheet.jpg", "image/jpeg")}
"""Of the small pictures: what their names end with, and their type."""


def limits_of_video(options: VideoOptions) -> Limits:
    """What can be made a file of the format that is asked for."""
    return Limits(only_videos=True, max_total_pixels=MAX_GIF_PIXELS if options.output_format == "gif" else None)


def video_work(services: Services, job: Job) -> "VideoWork":
    """What is done with the outputs of a job for videos."""
    return VideoWork(services, msgspec.convert(job.asked.options, VideoOptions))


class VideoWork:
    """Writes the files of one job."""

    def __init__(self, services: Services, options: VideoOptions) -> None:
        self.options = options
        self.limits = limits_of_video(options)
        self._services = services
        self._files: dict[int, StoredFile] = {}

    async def finish(self, live: LiveRequest, completed: Completed) -> None:
        """Write an output; with the last one, the job is finished."""
        if not completed.is_video and live.params.num_frames != 1:
            raise PipelineFailed("the model makes no videos; ask for pictures at /v1/images/generations")
        if not len(completed.frames):
            raise PipelineFailed("the model made sound only, which isn't served over HTTP; sgld generate writes it")
        self._files[completed.output_index] = await self._write(live, completed)
        if len(self._files) == live.params.num_outputs_per_prompt:
            await self._services.jobs.keep(live, [file for _, file in sorted(self._files.items())])

    def _encoder(self, live: LiveRequest, completed: Completed, fps: float) -> Callable[[Path], None]:
        """Writes the video into a file."""
        options, model_path = self.options, self._services.engine_config.model_path
        metadata = metadata_of(model_path, live.params, completed) if options.metadata else None
        about: dict[str, Any] = {"fps": fps, "quality": options.encoding_quality, "metadata": metadata}
        if options.output_format == "mp4":
            sound: dict[str, Any] = {"audio": completed.audio, "sample_rate": completed.sample_rate}
            return video_writer(completed.frames, encoding=options.encoding, **sound, **about)
        return partial(write_animation, frames=completed.frames, animation_format=options.output_format, **about)

    async def _write(self, live: LiveRequest, completed: Completed) -> StoredFile:
        frames, name, options = completed.frames, f"{live.id}/{completed.output_index}", self.options
        key, media_type = f"{name}{extension_of(options.output_format)}", media_type_of(options.output_format)
        fps = completed.fps or DEFAULT_FPS
        hook = load_hook(self._services.config.storage.output_hook)
        write_file, size_bytes = hooked(self._encoder(live, completed, fps), hook, media_type), 0

        def write(path: Path) -> None:
            nonlocal size_bytes
            write_file(path)
            size_bytes = path.stat().st_size

        storage = self._services.jobs.storage
        grows = options.output_format == "mp4" and options.video_fragmented and hook is None
        await storage.put(key, write, media_type, grows=grows)
        pictures = {"thumbnail": await run_sync(small, frames[0]), "spritesheet": await run_sync(spritesheet, frames)}
        for variant, picture in pictures.items():
            ending, kind = VARIANTS[variant]
            size_bytes += len(picture)
            await storage.put(f"{name}{ending}", picture, kind)
        num_frames, height, width, _ = frames.shape
        return StoredFile(
            key=key,
            media_type=media_type,
            width=width,
            height=height,
            seed=completed.seed,
            size_bytes=size_bytes,
            num_frames=num_frames,
            fps=fps,
        )
