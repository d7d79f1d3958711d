"""/v1/images: pictures from prompts and pictures, at once or as a stream with previews."""

from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sgld.errors import InvalidRequest
from sgld.media.images import check_format
from sgld.media.inputs import references
from sgld.server import results
from sgld.server.auth import owner_of
from sgld.server.bodies import data_url, read_form, read_json, unless_gone
from sgld.server.errors import json_response, not_found
from sgld.server.idempotency import idempotency_key, submit_job
from sgld.server.image_work import ImageWork, Verb, url_of
from sgld.server.job_store import Asked, Job
from sgld.server.limits import check_limits, check_sources, number_in
from sgld.server.loras import with_adapters
from sgld.server.request_fields import in_words
from sgld.server.requests import LiveRequest
from sgld.server.schemas import ImageData, ImageRequest, image_request
from sgld.server.services import services_of
from sgld.server.sse import EventStream

KIND = "img"
_PICTURES = frozenset({"image", "mask", "url"})


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
    job = await _finished(request)
    urls = [await url_of(request, job.id, file, variant) for variant, file in enumerate(job.files)]
    uploads = [await results.upload_of(services_of(request).jobs.storage, file.key) for file in job.files]
    data = [
        ImageData(seed=file.seed, url=url, upload=upload)
        for file, url, upload in zip(job.files, urls, uploads, strict=True)
    ]
    prompt = job.asked.params.prompt
    return json_response({"id": job.id, "created": job.created_at, "prompt": prompt, "data": data})


async def get_content(request: Request) -> Response:
    """GET /v1/images/{id}/content?variant=N."""
    job = await _finished(request)
    variant = request.query_params.get("variant", "0")
    if (number := number_in(variant, len(job.files))) is None:
        raise not_found(f"variant {variant[:20]} of {job.id}: it has {len(job.files)}, counted from 0")
    file = job.files[number]
    return await results.content(request, file.key, file.media_type)


async def delete_image(request: Request) -> Response:
    """DELETE /v1/images/{id}: ends it if it runs, and removes what there is of it."""
    services, request_id, owner = services_of(request), request.path_params["id"], owner_of(request)
    if (job := await services.jobs.get(request_id, KIND, owner)) is not None:
        await services.jobs.delete(job)
        services.feed.forget(job.id)
    elif (live := services.requests.get(request_id, owner)) is not None:
        live.cancel()
    else:
        raise not_found(f"image {request_id[:80]!r}")
    return json_response({"id": request_id, "object": "image.deleted", "deleted": True})


async def _finished(request: Request) -> Job:
    request_id = request.path_params["id"]
    job = await services_of(request).jobs.get(request_id, KIND, owner_of(request))
    if job is None or job.status != "completed":
        raise not_found(f"image {request_id[:80]!r}")
    return job


async def data_url_of(request: Request, image_id: str) -> str:
    """The first picture of an image, as the input of another request.

    :raises InvalidRequest: there is none.
    """
    services = services_of(request)
    job = await services.jobs.get(image_id, KIND, owner_of(request))
    content = await services.jobs.storage.read(job.files[0].key) if job is not None and job.files else None
    if content is None:
        message = f"there is no image {image_id[:80]!r}; a file_id is the id of an image that was made here"
        raise InvalidRequest(message, "file_id")
    return data_url(content)


async def _edit_request(request: Request) -> ImageRequest:
    config = services_of(request).config
    form = await read_form(request, _PICTURES, max_bytes=config.max_body_bytes, max_pixels=config.max_pixels)
    images = (*form.pictures.get("image", ()), *form.pictures.get("url", ()))
    masks = form.pictures.get("mask", [])
    if not images and not any(references([*form.fields.values()])):
        raise InvalidRequest("there is no picture to edit: send it as image, or its URL as url", "image")
    if len(masks) > 1:
        raise InvalidRequest(f"there are {len(masks)} masks; send one", "mask")
    return image_request(form.fields, images=images, mask=masks[0] if masks else None, is_form=True)


async def _answer(request: Request, asked: ImageRequest, verb: Verb) -> Response:
    with in_words(asked.words):
        return await _answer_in_our_words(request, asked, verb)


async def _answer_in_our_words(request: Request, asked: ImageRequest, verb: Verb) -> Response:
    services, owner = services_of(request), owner_of(request)
    check_format(asked.options.format)
    check_limits(asked.params, services.config, services.engine.model)
    await check_sources(asked.params, services.config)
    if idempotency_key(request) is not None or not asked.options.wait:
        return await _answer_job(request, asked, verb)
    params = await with_adapters(services, asked.params)
    work = ImageWork(services, asked.options)

    async def submit() -> LiveRequest:
        return await services.requests.submit(params, kind=KIND, owner=owner, finish=work.finish)

    if asked.options.stream:
        live = await unless_gone(request, submit)
        return EventStream(work.stream(live, verb), heartbeat_s=services.config.heartbeat_s)

    async def complete() -> Response:
        live = await submit()
        try:
            return await work.response(live, request)
        finally:
            live.cancel()

    return await unless_gone(request, complete)


async def _answer_job(request: Request, asked: ImageRequest, verb: Verb) -> Response:
    """Make it a job, which goes on when the client leaves, or find the one that the client's key stands for."""
    services = services_of(request)
    options, model_path = msgspec.to_builtins(asked.options), services.engine_config.model_path
    job = await submit_job(request, KIND, Asked(params=asked.params, options=options, model_path=model_path))
    if not asked.options.wait:
        status = services.feed.get(job.id, job.owner) or {"id": job.id, "object": "request", "status": job.status}
        return json_response(status, 202, {"location": f"/v1/requests/{job.id}"})
    running = await services.jobs.wait_running(job.id)
    if running is not None:
        live, work = running.live, running.work
        assert isinstance(work, ImageWork), f"{job.id} is no job for pictures"
        if asked.options.stream:
            return EventStream(work.stream(live, verb), heartbeat_s=services.config.heartbeat_s)
        return await unless_gone(request, partial(work.response, live, request))
    work = await ImageWork.of_finished(services, job, asked.options)
    if asked.options.stream:
        return EventStream(work.stream_finished(job, verb), heartbeat_s=services.config.heartbeat_s)
    return await work.answer(job, request)
