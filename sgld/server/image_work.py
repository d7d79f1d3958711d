"""The pictures of one request for them: encoded, kept, and put into one answer or a stream with previews."""

import time
from collections.abc import AsyncGenerator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Self, assert_never

import msgspec
from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response

from sgld.errors import PipelineFailed
from sgld.events import Cancelled, Completed, Failed, Frames, Preview, Progress, Queued, Restarted, Started
from sgld.media.files import extension_of, media_type_of
from sgld.media.hook import hooked_bytes, load_hook
from sgld.media.images import encode_image, has_alpha
from sgld.request import NO_LIMITS
from sgld.server import results
from sgld.server.errors import ApiError, from_code, from_event, not_found, shutting_down
from sgld.server.inlined import json_with
from sgld.server.job_store import Job, StoredFile
from sgld.server.metadata import metadata_of
from sgld.server.requests import LiveRequest
from sgld.server.schemas import (
    CompletedImage,
    CompletedType,
    ImageData,
    ImageOptions,
    ImagesResponse,
    PartialImage,
    PartialType,
)
from sgld.server.services import Services
from sgld.server.sse import encode_event
from sgld.storage import Upload

Verb = Literal["image_generation", "image_edit"]
_PARTIAL: dict[Verb, PartialType] = {
    "image_generation": "image_generation.partial_image",
    "image_edit": "image_edit.partial_image",
}
_COMPLETED: dict[Verb, CompletedType] = {
    "image_generation": "image_generation.completed",
    "image_edit": "image_edit.completed",
}


@dataclass(frozen=True)
class Picture:
    """One picture of a result, encoded."""

    content: bytes
    file: StoredFile
    has_alpha: bool

    @property
    def size(self) -> str:
        return f"{self.file.width}x{self.file.height}"

    @property
    def background(self) -> Literal["opaque", "transparent"]:
        return "transparent" if self.has_alpha else "opaque"


def image_work(services: Services, job: Job) -> "ImageWork":
    """What is done with the outputs of a job for pictures."""
    return ImageWork(services, msgspec.convert(job.asked.options, ImageOptions), is_job=True)


class ImageWork:
    """What is done with the events of one request for pictures.

    :param is_job: it goes on when nobody reads them.
    """

    limits = NO_LIMITS

    def __init__(self, services: Services, options: ImageOptions, *, is_job: bool = False) -> None:
        self._services = services
        self._is_job = is_job
        self._options = options
        self._started_at = time.monotonic()
        self._pictures: dict[int, list[Picture]] = {}

    @classmethod
    async def of_finished(cls, services: Services, job: Job, options: ImageOptions) -> Self:
        """That of a job that has ended, with its pictures.

        :raises ApiError: it has none.
        """
        now = await services.jobs.get(job.id, job.kind, job.owner)
        if now is None or not now.is_finished:
            raise shutting_down()
        if now.error is not None:
            raise from_code(now.error.code, now.error.message)
        work = cls(services, options, is_job=True)
        for file in now.files:
            content = await services.jobs.storage.read(file.key)
            if content is None:
                raise not_found(f"content of {job.id} any more")
            index = int(file.key.rpartition("/")[2].partition("-")[0])
            work._pictures.setdefault(index, []).append(Picture(content, file, await run_sync(has_alpha, content)))
        return work

    async def finish(self, live: LiveRequest, completed: Completed) -> None:
        """Encode an output, which may have several pictures, such as layers; with the last one, store them all."""
        if not len(completed.frames):
            raise PipelineFailed("the model made sound only, which isn't served over HTTP; sgld generate writes it")
        model_path = self._services.engine_config.model_path
        metadata = metadata_of(model_path, live.params, completed) if self._options.metadata else None
        self._pictures[completed.output_index] = [
            await self._picture(f"{live.id}/{completed.output_index}-{number}", frame, completed.seed, metadata)
            for number, frame in enumerate(completed.frames)
        ]
        if len(self._pictures) == live.params.num_outputs_per_prompt:
            await self._store(live)

    async def _picture(self, name: str, frame: Any, seed: int, metadata: dict[str, Any] | None) -> Picture:
        image_format = self._options.format
        height, width, channels = frame.shape
        media_type = media_type_of(image_format)
        hook = load_hook(self._services.config.storage.output_hook)
        content = await run_sync(hooked_bytes, await self._encoded(frame, metadata), hook, media_type)
        file = StoredFile(
            key=f"{name}{extension_of(image_format)}",
            media_type=media_type,
            width=width,
            height=height,
            seed=seed,
            size_bytes=len(content),
        )
        return Picture(content, file, channels == 4 and image_format != "jpeg")

    async def _store(self, live: LiveRequest) -> None:
        jobs = self._services.jobs
        files = [picture.file for picture in self._in_order]
        async with nullcontext() if self._is_job else jobs.forgotten_on_failure(live.id):
            if not self._is_job:
                await jobs.announce(live, files)
            for picture in self._in_order:
                await jobs.storage.put(picture.file.key, picture.content, picture.file.media_type)
            await jobs.keep(live, files)

    @property
    def _in_order(self) -> list[Picture]:
        return [picture for _, pictures in sorted(self._pictures.items()) for picture in pictures]

    async def response(self, live: LiveRequest, request: Request) -> Response:
        """Wait for all pictures and put them into one answer."""
        with live.subscribe(ignores=(Progress, Preview, Frames)) as events:
            async for event in events:
                if isinstance(event, Failed | Cancelled):
                    raise self._error(event)
        return await self.answer(live, request)

    async def answer(self, source: LiveRequest | Job, request: Request) -> Response:
        """All pictures in one answer."""
        pictures = self._in_order
        body = ImagesResponse(
            id=source.id,
            created=source.created_at,
            data=[await self._data(request, source.id, picture, i) for i, picture in enumerate(pictures)],
            output_format=self._options.format,
            size=pictures[0].size,
            background=pictures[0].background,
            inference_time_s=round(time.monotonic() - self._started_at, 3),
        )
        is_inside = self._options.response_format != "url"
        return json_with(body, "b64_json", [picture.content for picture in pictures] if is_inside else [])

    async def stream(self, live: LiveRequest, verb: Verb) -> AsyncGenerator[bytes, None]:
        """Events of OpenAI's stream; the request is cancelled when nobody reads them."""
        num_partial = [0] * live.params.num_outputs_per_prompt
        try:
            with live.subscribe(ignores=(Frames,)) as events:
                async for event in events:
                    match event:
                        case Preview(output_index=index):
                            yield await self._partial(live, event, verb, num_partial[index])
                            num_partial[index] += 1
                        case Completed(output_index=index):
                            for picture in self._pictures[index]:
                                yield await self._completed(live, picture, index, verb)
                        case Failed() | Cancelled():
                            yield encode_event("error", self._error(event).body)
                            return
                        case Progress():
                            if self._options.progress_events:
                                yield encode_event(
                                    f"{verb}.progress", {"type": f"{verb}.progress", **msgspec.to_builtins(event)}
                                )
                        case Queued() | Started() | Restarted() | Frames():
                            pass
                        case unknown:
                            assert_never(unknown)
        finally:
            if not self._is_job:
                live.cancel()

    async def stream_finished(self, job: Job, verb: Verb) -> AsyncGenerator[bytes, None]:
        """The end of the stream of a job that has ended."""
        for index, pictures in sorted(self._pictures.items()):
            for picture in pictures:
                yield await self._completed(job, picture, index, verb)

    def _error(self, event: Failed | Cancelled) -> ApiError:
        is_stopped = isinstance(event, Cancelled) and self._services.stopping.is_set()
        return shutting_down() if is_stopped else from_event(event)

    async def _partial(self, live: LiveRequest, preview: Preview, verb: Verb, number: int) -> bytes:
        height, width, _ = preview.image.shape
        event = PartialImage(
            type=_PARTIAL[verb],
            b64_json=await self._encoded(preview.image, None),
            partial_image_index=number,
            created_at=live.created_at,
            size=f"{width}x{height}",
            output_format=self._options.format,
            index=preview.output_index,
        )
        return encode_event(event.type, event)

    async def _completed(self, source: LiveRequest | Job, picture: Picture, index: int, verb: Verb) -> bytes:
        event = CompletedImage(
            type=_COMPLETED[verb],
            b64_json=picture.content,
            created_at=source.created_at,
            size=picture.size,
            background=picture.background,
            output_format=self._options.format,
            index=index,
            seed=picture.file.seed,
            id=source.id,
            upload=await self._upload_of(picture),
        )
        return await run_sync(encode_event, event.type, event)

    async def _encoded(self, frame: Any, metadata: dict[str, Any] | None) -> bytes:
        def encode() -> bytes:
            return encode_image(frame, self._options.format, quality=self._options.encoding_quality, metadata=metadata)

        return await run_sync(encode)

    async def _data(self, request: Request, request_id: str, picture: Picture, variant: int) -> ImageData:
        upload = await self._upload_of(picture)
        if self._options.response_format == "url":
            url = await url_of(request, request_id, picture.file, variant)
            return ImageData(seed=picture.file.seed, url=url, upload=upload)
        # The picture itself is put there while the answer is sent.
        return ImageData(seed=picture.file.seed, b64_json=b"", upload=upload)

    async def _upload_of(self, picture: Picture) -> Upload | None:
        return await results.upload_of(self._services.jobs.storage, picture.file.key)


async def url_of(request: Request, request_id: str, file: StoredFile, variant: int) -> str:
    return await results.url_of(request, file.key, f"v1/images/{request_id}/content?variant={variant}")
