"""/v1/videos: videos as jobs, which are asked about until they have an end."""

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sgld.errors import InvalidRequest
from sgld.server import images, results
from sgld.server.auth import owner_of
from sgld.server.bodies import media_type, read_form, read_json
from sgld.server.errors import ApiError, json_response, not_found
from sgld.server.idempotency import submit_job
from sgld.server.job_store import Asked, Job, StoredFile
from sgld.server.jobs import RunningJob
from sgld.server.limits import check_limits, check_sources, number_in
from sgld.server.request_fields import in_words
from sgld.server.services import services_of
from sgld.server.video_schemas import (
    Video,
    VideoError,
    VideoList,
    VideoOptions,
    length_of,
    size_of_frames,
    video_request,
)
from sgld.server.video_work import VARIANTS, limits_of_video

KIND = "video"
_REFERENCES = frozenset({"input_reference", "reference_url"})
_MAX_PAGE = 100
# How often clients ask, at least and at most; they want to see it advance.
_MIN_POLL_S, _MAX_POLL_S = 0.2, 5.0
_UNKNOWN_POLL_S = 1.0


async def create(request: Request) -> Response:
    """POST /v1/videos."""
    services = services_of(request)
    fields, pictures, is_form = await _read(request)
    served = services.engine.model
    asked = video_request(fields, model_fps=served.fps if served else None, is_form=is_form)
    sources = (*pictures, *await _referred(request, asked.options))
    params = msgspec.structs.replace(asked.params, image_path=sources)
    options = msgspec.to_builtins(msgspec.structs.replace(asked.options, input_reference=None, reference_url=None))
    model_path = services.engine_config.model_path
    with in_words(asked.words):
        check_limits(params, services.config, served, limits_of_video(asked.options))
        await check_sources(params, services.config)
        return await _accept(request, Asked(params=params, options=options, model_path=model_path))


async def remix(request: Request) -> Response:
    """POST /v1/videos/{id}/remix: the same with another prompt."""
    job, fields = await video_job(request), await read_json(request)
    prompt = msgspec.convert(fields.get("prompt"), str | None)
    if not prompt:
        raise InvalidRequest("there is no prompt", "prompt")
    if fields.keys() != {"prompt"}:
        name = next(name for name in fields if name != "prompt")
        raise ApiError(400, f"a remix has a prompt only, not {name!r}", "unknown_parameter", param=name)
    params = msgspec.structs.replace(job.asked.params, prompt=prompt)
    services = services_of(request)
    limits = limits_of_video(msgspec.convert(job.asked.options, VideoOptions))
    check_limits(params, services.config, services.engine.model, limits)
    model_path = services.engine_config.model_path
    return await _accept(
        request, msgspec.structs.replace(job.asked, params=params, model_path=model_path, remixed_from=job.id)
    )


async def list_videos(request: Request) -> Response:
    """GET /v1/videos?after&limit&order."""
    services, query = services_of(request), request.query_params
    limit, order = query.get("limit", "20"), query.get("order", "desc")
    if not (num := number_in(limit, _MAX_PAGE + 1)):
        raise InvalidRequest(f"limit is {limit[:20]!r}; it must be 1 to {_MAX_PAGE}", "limit")
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"order is {order[:20]!r}; it must be asc or desc", "order")
    found = await services.jobs.page(
        owner_of(request), KIND, after=query.get("after"), limit=num + 1, is_newest_first=order == "desc"
    )
    data = [await video_of(request, job) for job in found[:num]]
    first_id, last_id = (data[0].id, data[-1].id) if data else (None, None)
    return json_response(VideoList(data=data, first_id=first_id, last_id=last_id, has_more=len(found) > len(data)))


async def get_video(request: Request) -> Response:
    """GET /v1/videos/{id}: 200 also if it failed."""
    return await _answer(request, await video_job(request))


async def delete_video(request: Request) -> Response:
    """DELETE /v1/videos/{id}: ends it if it is unfinished, and removes what there is of it."""
    services, job = services_of(request), await video_job(request)
    await services.jobs.delete(job)
    services.feed.forget(job.id)
    return json_response({"id": job.id, "object": "video.deleted", "deleted": True})


async def cancel_video(request: Request) -> Response:
    """POST /v1/videos/{id}/cancel: it fails, if it isn't finished."""
    await services_of(request).jobs.cancel(await video_job(request))
    return await _answer(request, await video_job(request))


async def get_content(request: Request) -> Response:
    """GET /v1/videos/{id}/content?variant=video|thumbnail|spritesheet&index=N."""
    job = await video_job(request)
    file = output_of(job, request)
    variant = request.query_params.get("variant", "video")
    key, kind = file.key, file.media_type
    # SGLang's clients name an output by its number.
    if variant in VARIANTS:
        ending, kind = VARIANTS[variant]
        key = key.rpartition(".")[0] + ending
    elif variant != "video" and not variant.isdecimal():
        raise InvalidRequest(f"variant is {variant[:20]!r}; it must be video, {' or '.join(VARIANTS)}", "variant")
    return await results.content(request, key, kind)


async def video_job(request: Request) -> Job:
    """The job that a path names.

    :raises ApiError: there is none, or it is somebody else's.
    """
    job_id = request.path_params["id"]
    job = await services_of(request).jobs.get(job_id, KIND, owner_of(request))
    if job is None:
        raise not_found(f"video {job_id[:80]!r}")
    return job


def output_index(job: Job, request: Request) -> int:
    """Which of a job's outputs is asked for.

    :raises ApiError: it hasn't so many.
    """
    variant = request.query_params.get("variant", "")
    index = variant if variant.isdecimal() else request.query_params.get("index", "0")
    num_outputs = job.asked.params.num_outputs_per_prompt
    if (number := number_in(index, num_outputs)) is None:
        raise not_found(f"output {index[:20]} of {job.id}: it has {num_outputs}, counted from 0")
    return number


def output_of(job: Job, request: Request) -> StoredFile:
    """The file of a finished job that is asked for.

    :raises ApiError: there is none.
    """
    index = output_index(job, request)
    if job.error is not None:
        raise ApiError(404, f"{job.id} has no content, it failed: {job.error.message}", "video_failed")
    if job.status != "completed":
        raise ApiError(404, f"{job.id} isn't finished; ask again when its status is completed", "video_not_ready")
    return job.files[index]


async def video_of(request: Request, job: Job) -> Video:
    """A job as clients see it."""
    services = services_of(request)
    running = None if job.is_finished else services.jobs.running(job.id)
    path = f"v1/videos/{job.id}/content?index="
    urls = [await results.url_of(request, file.key, f"{path}{index}") for index, file in enumerate(job.files)]
    return Video(
        id=job.id,
        model=services.model_name,
        status=job.status,
        progress=100 if job.status == "completed" else running.progress if running else 0,
        created_at=job.created_at,
        completed_at=job.completed_at,
        expires_at=services.jobs.expires_at(job),
        prompt=job.asked.params.prompt,
        seconds=length_of(job),
        size=size_of_frames(job),
        seed=job.asked.params.seed,
        num_outputs=job.asked.params.num_outputs_per_prompt,
        eta_s=running.eta_s if running else None,
        remixed_from_video_id=job.asked.remixed_from,
        error=VideoError(code=job.error.code, message=job.error.message) if job.error else None,
        url=urls[0] if urls else None,
        urls=urls,
        upload=await results.upload_of(services.jobs.storage, *(file.key for file in job.files)),
    )


async def _read(request: Request) -> tuple[Mapping[str, Any], list[str], bool]:
    """The fields of a request, the pictures of its form, and whether it is one."""
    if media_type(request) in ("application/json", ""):
        return await read_json(request), [], False
    config = services_of(request).config
    form = await read_form(request, _REFERENCES, max_bytes=config.max_body_bytes, max_pixels=config.max_pixels)
    return form.fields, [source for name in sorted(form.pictures) for source in form.pictures[name]], True


async def _referred(request: Request, options: VideoOptions) -> list[str]:
    """The sources of the pictures that fields name."""
    sources = [] if options.reference_url is None else [options.reference_url]
    reference = options.input_reference
    if isinstance(reference, str):
        reference = {"image_url": reference}
    if reference is None:
        return sources
    if reference.keys() == {"image_url"}:
        return [*sources, reference["image_url"]]
    if reference.keys() == {"file_id"}:
        return [*sources, await images.data_url_of(request, reference["file_id"])]
    message = 'input_reference must be a file, a URL, {"image_url": URL} or {"file_id": ID}'
    raise InvalidRequest(message, "input_reference")


async def _accept(request: Request, asked: Asked) -> Response:
    job = await submit_job(request, KIND, asked)
    return await _answer(request, await services_of(request).jobs.get(job.id, KIND, owner_of(request)) or job)


async def _answer(request: Request, job: Job) -> Response:
    headers = {} if job.is_finished else {"openai-poll-after-ms": _poll_ms(services_of(request).jobs.running(job.id))}
    return json_response(await video_of(request, job), headers=headers)


def _poll_ms(running: RunningJob | None) -> str:
    eta_s = running.eta_s if running else None
    wait_s = _UNKNOWN_POLL_S if eta_s is None else min(max(eta_s, _MIN_POLL_S), _MAX_POLL_S)
    return f"{1000 * wait_s:.0f}"
