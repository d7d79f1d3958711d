"""/v1/images: pictures from prompts and pictures, at once or as a stream with previews."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import msgspec
from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response

from sgld import __version__
from sgld.errors import InvalidRequest, PipelineFailed
from sgld.events import Cancelled, Completed, Failed, Frames, Preview, Progress, Queued, Restarted, Started
from sgld.media.files import extension_of
from sgld.media.images import encode_image
from sgld.media.inputs import references
from sgld.server.auth import owner_of
from sgld.server.bodies import read_form, read_json, unless_gone
from sgld.server.errors import ApiError, from_event, json_response, not_found, shutting_down
from sgld.server.limits import check_limits, check_sources
from sgld.server.requests import LiveRequest
from sgld.server.results import Record, StoredFile
from sgld.server.schemas import (
    CompletedImage,
    CompletedType,
    ImageData,
    ImageOptions,
    ImageRequest,
    ImagesResponse,
    PartialImage,
    PartialType,
    image_request,
)
from sgld.server.services import Services, services_of
from sgld.server.sse import EventStream, encode_event

KIND = "img"
_PICTURES = frozenset({"image", "mask", "url"})
_Verb = Literal["image_generation", "image_edit"]
# What changed nothing of what a picture shows.
_NOT_OF_PICTURES = frozenset({"num_previews", "priority", "deadline_s"})
_PARTIAL: dict[_Verb, PartialType] = {
    "image_generation": "image_generation.partial_image",
    "image_edit": "image_edit.partial_image",
}
_COMPLETED: dict[_Verb, CompletedType] = {
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


async def generations(request: Request) -> Response:
    """POST /v1/images/generations."""
    return await _answer(request, image_request(await read_json(request)), "image_generation")


async def edits(request: Request) -> Response:
    """POST /v1/images/edits."""
    return await _answer(request, await _edit_request(request), "image_edit")


async def variations(request: Request) -> Response:
    """POST /v1/images/variations: an edit that needs no prompt."""
    return await edits(request)


async def get_image(request: Request) -> Response:
    """GET /v1/images/{id}."""
    record = await _record(request)
    urls = [_url(request, record.id, variant) for variant in range(len(record.files))]
    data = [ImageData(seed=file.seed, url=url) for file, url in zip(record.files, urls, strict=True)]
    return json_response({"id": record.id, "created": record.created_at, "prompt": record.prompt, "data": data})


async def get_content(request: Request) -> Response:
    """GET /v1/images/{id}/content?variant=N."""
    record = await _record(request)
    variant = request.query_params.get("variant", "0")
    if not variant.isdecimal() or int(variant) >= len(record.files):
        raise not_found(f"variant {variant[:20]} of {record.id}: it has {len(record.files)}, counted from 0")
    file = record.files[int(variant)]
    storage = services_of(request).results.storage
    if (path := await storage.file(file.key)) is not None:
        return FileResponse(path, media_type=file.media_type)
    if (url := await storage.url(file.key)) is not None:
        return RedirectResponse(url, 302)
    raise not_found(f"content of {record.id} any more")


async def delete_image(request: Request) -> Response:
    """DELETE /v1/images/{id}: ends it if it runs, and removes what there is of it."""
    services, request_id = services_of(request), request.path_params["id"]
    if (live := services.requests.get(request_id, owner_of(request))) is not None:
        live.cancel()
    else:
        await services.results.delete(await _record(request))
    return json_response({"id": request_id, "object": "image.deleted", "deleted": True})


async def _record(request: Request) -> Record:
    request_id = request.path_params["id"]
    record = await services_of(request).results.get(request_id, KIND, owner_of(request))
    if record is None:
        raise not_found(f"image {request_id[:80]!r}")
    return record


async def _edit_request(request: Request) -> ImageRequest:
    config = services_of(request).config
    form = await read_form(request, _PICTURES, max_bytes=config.max_body_bytes, max_pixels=config.max_pixels)
    images = (*form.pictures.get("image", ()), *form.pictures.get("url", ()))
    masks = form.pictures.get("mask", [])
    if not images:
        raise InvalidRequest("there is no picture to edit: send it as image, or its URL as url", "image")
    if len(masks) > 1:
        raise InvalidRequest(f"there are {len(masks)} masks; send one", "mask")
    return image_request(form.fields, images=images, mask=masks[0] if masks else None, is_form=True)


async def _answer(request: Request, asked: ImageRequest, verb: _Verb) -> Response:
    services, owner = services_of(request), owner_of(request)
    check_limits(asked.params, services.config)
    await check_sources(asked.params, services.config)
    job = _Job(services, asked.options)

    async def submit() -> LiveRequest:
        return await services.requests.submit(asked.params, kind=KIND, owner=owner, finish=job.finish)

    if asked.options.stream:
        live = await unless_gone(request, submit)
        return EventStream(job.stream(live, verb), heartbeat_s=services.config.heartbeat_s)

    if not asked.options.wait:
        live = await submit()
        headers = {"location": f"/v1/requests/{live.id}"}
        return json_response(services.feed.get(live.id, owner), 202, headers)

    async def complete() -> Response:
        live = await submit()
        try:
            return await job.response(live, request)
        finally:
            live.cancel()

    return await unless_gone(request, complete)


def _url(request: Request, request_id: str, variant: int) -> str:
    return f"{request.base_url}v1/images/{request_id}/content?variant={variant}"


class _Job:
    """What is done with the events of one request for pictures."""

    def __init__(self, services: Services, options: ImageOptions) -> None:
        self._services = services
        self._options = options
        self._started_at = time.monotonic()
        self._pictures: dict[int, list[Picture]] = {}

    async def finish(self, live: LiveRequest, completed: Completed) -> None:
        """Encode an output, which may have several pictures, such as layers; with the last one, store them all."""
        if not len(completed.frames):
            raise PipelineFailed("the model made no picture; ask for what it makes")
        metadata = self._metadata(live, completed) if self._options.metadata else None
        self._pictures[completed.output_index] = [
            await self._picture(f"{live.id}/{completed.output_index}-{number}", frame, completed.seed, metadata)
            for number, frame in enumerate(completed.frames)
        ]
        if len(self._pictures) == live.params.num_outputs_per_prompt:
            await self._store(live)

    async def _picture(self, name: str, frame: Any, seed: int, metadata: dict[str, Any] | None) -> Picture:
        image_format = self._options.format
        height, width, channels = frame.shape
        file = StoredFile(
            key=f"{name}{extension_of(image_format)}",
            media_type=f"image/{image_format}",
            width=width,
            height=height,
            seed=seed,
        )
        has_alpha = channels == 4 and image_format != "jpeg"
        return Picture(await self._encoded(frame, metadata), file, has_alpha)

    async def _store(self, live: LiveRequest) -> None:
        for picture in self._in_order:
            await self._services.results.storage.put(picture.file.key, picture.content, picture.file.media_type)
        record = Record(
            id=live.id,
            kind=live.kind,
            owner=live.owner,
            created_at=live.created_at,
            prompt=live.params.prompt,
            files=tuple(picture.file for picture in self._in_order),
        )
        await self._services.results.keep(record)

    @property
    def _in_order(self) -> list[Picture]:
        return [picture for _, pictures in sorted(self._pictures.items()) for picture in pictures]

    async def response(self, live: LiveRequest, request: Request) -> Response:
        """Wait for all pictures and put them into one answer."""
        with live.subscribe(ignores=(Progress, Preview, Frames)) as events:
            async for event in events:
                if isinstance(event, Failed | Cancelled):
                    raise self._error(event)
        pictures = self._in_order
        body = ImagesResponse(
            id=live.id,
            created=live.created_at,
            data=[self._data(picture, _url(request, live.id, i)) for i, picture in enumerate(pictures)],
            output_format=self._options.format,
            size=pictures[0].size,
            background=pictures[0].background,
            inference_time_s=round(time.monotonic() - self._started_at, 3),
        )
        content = await run_sync(msgspec.json.encode, body)
        return Response(content, media_type="application/json")

    async def stream(self, live: LiveRequest, verb: _Verb) -> AsyncGenerator[bytes, None]:
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
                                yield encode_event(f"{verb}.progress", {"type": f"{verb}.progress", **_asdict(event)})
                        case Queued() | Started() | Restarted() | Frames():
                            pass
                        case unknown:
                            assert_never(unknown)
        finally:
            live.cancel()

    def _error(self, event: Failed | Cancelled) -> ApiError:
        is_stopped = isinstance(event, Cancelled) and self._services.stopping.is_set()
        return shutting_down() if is_stopped else from_event(event)

    async def _partial(self, live: LiveRequest, preview: Preview, verb: _Verb, number: int) -> bytes:
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

    async def _completed(self, live: LiveRequest, picture: Picture, index: int, verb: _Verb) -> bytes:
        event = CompletedImage(
            type=_COMPLETED[verb],
            b64_json=picture.content,
            created_at=live.created_at,
            size=picture.size,
            background=picture.background,
            output_format=self._options.format,
            index=index,
            seed=picture.file.seed,
            id=live.id,
        )
        return await run_sync(encode_event, event.type, event)

    async def _encoded(self, frame: Any, metadata: dict[str, Any] | None) -> bytes:
        def encode() -> bytes:
            return encode_image(frame, self._options.format, quality=self._options.encoding_quality, metadata=metadata)

        return await run_sync(encode)

    def _data(self, picture: Picture, url: str) -> ImageData:
        if self._options.response_format == "url":
            return ImageData(seed=picture.file.seed, url=url)
        return ImageData(seed=picture.file.seed, b64_json=picture.content)

    def _metadata(self, live: LiveRequest, completed: Completed) -> dict[str, Any]:
        """What repeats this picture, as `sgld generate` writes it; input pictures aren't in it."""
        params = msgspec.structs.replace(live.params, seed=completed.seed, image_path=(), num_outputs_per_prompt=1)
        chosen = {n: v for n, v in _asdict(params).items() if v not in (None, (), [], {}) and n not in _NOT_OF_PICTURES}
        if any(references(params.diffusers_kwargs)):
            del chosen["diffusers_kwargs"]
        return {"version": __version__, "model_path": self._services.engine_config.model_path, "params": chosen}


def _asdict(struct: msgspec.Struct) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(struct)
    return fields
