"""Videos while they are made: as events, and as a file that plays while it grows."""

from base64 import b64encode
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, assert_never

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from sgld.events import (
    AnyEvent,
    Cancelled,
    Completed,
    Failed,
    Frames,
    Preview,
    Progress,
    Queued,
    Restarted,
    Started,
    Terminal,
)
from sgld.media.thumbnails import small
from sgld.media.videos import GrowingVideo
from sgld.sampling_params import DEFAULT_FPS
from sgld.server.auth import owner_of
from sgld.server.bodies import unless_gone
from sgld.server.errors import from_event, shutting_down
from sgld.server.jobs import RunningJob
from sgld.server.limits import number_in
from sgld.server.requests import LiveRequest
from sgld.server.services import services_of
from sgld.server.sse import HEADERS, EventStream, encode_event
from sgld.server.video_work import VideoWork
from sgld.server.videos import KIND, get_content, output_index, video_job, video_of

# More than a request has to tell.
_MAX_EVENTS = 10**9
_END = "end"


async def events(request: Request) -> Response:
    """GET /v1/videos/{id}/events: all that happens until it has an end; Last-Event-ID says what was heard already."""
    job = await video_job(request)
    services = services_of(request)
    if request.headers.get("last-event-id") == _END:
        # A browser comes back when a stream ends; this makes it stay away.
        return Response(status_code=204)

    async def stream() -> AsyncGenerator[bytes, None]:
        running = None if job.is_finished else await services.jobs.wait_running(job.id)
        if running is not None:
            async for chunk in _live_events(running, request.headers.get("last-event-id", "")):
                yield chunk
        yield await _end(request)

    return EventStream(stream(), heartbeat_s=services.config.heartbeat_s)


async def stream(request: Request) -> Response:
    """GET /v1/videos/{id}/stream?index=N: an MP4 file from its first frame on, as they are decoded."""
    job = await video_job(request)
    services, index = services_of(request), output_index(job, request)

    async def begin() -> Response:
        running = None if job.is_finished else await services.jobs.wait_running(job.id)
        if running is None:
            return await get_content(request)
        assert isinstance(running.work, VideoWork), f"{job.id} is no job for videos"
        served, quality = services.engine.model, running.work.options.encoding_quality
        params = job.asked.params
        fps = (params.fps or (served.fps if served else None) or DEFAULT_FPS) * params.frame_factor
        pieces = growing(running.live, index, fps=fps, quality=quality)
        # Until there is a frame, a failure has a status of its own.
        first = await anext(pieces)
        return StreamingResponse(_joined(first, pieces), headers=HEADERS, media_type="video/mp4")

    return await unless_gone(request, begin)


async def _live_events(running: RunningJob, last_id: str) -> AsyncGenerator[bytes, None]:
    epoch, _, number = last_id.partition("-")
    after = (number_in(number, _MAX_EVENTS) or 0) if epoch == running.live.epoch else 0
    with running.live.subscribe(after=after) as subscription:
        async for event in subscription:
            if (told := await run_sync(_told, event)) is not None:
                name, fields = told
                data = {"type": name, "id": running.live.id, "output_index": event.output_index, **fields}
                yield encode_event(name, data, event_id=f"{running.live.epoch}-{subscription.number}")
    await running.ended.wait()


def _told(event: AnyEvent) -> tuple[str, dict[str, Any]] | None:
    """The name of an event and what is said of it; None for ends, which are told of the whole job."""
    match event:
        case Queued(position=position, eta_s=eta_s):
            return "queued", {"position": position, "eta_s": eta_s}
        case Started():
            return "started", {}
        case Restarted(attempt=attempt):
            return "restarted", {"attempt": attempt}
        case Progress(step=step, num_steps=num_steps, eta_s=eta_s, stage=stage):
            return "progress", {"step": step, "num_steps": num_steps, "eta_s": eta_s, "stage": stage}
        case Preview(step=step, image=image):
            return "preview", {"step": step, "b64_webp": b64encode(small(image)).decode()}
        case Frames(index=index, frames=frames):
            pictures = [b64encode(small(frame)).decode() for frame in frames]
            return "frames", {"index": index, "b64_webp": pictures}
        case Completed() | Failed() | Cancelled():
            return None
        case unknown:
            assert_never(unknown)


async def _end(request: Request) -> bytes:
    """What became of a job; nothing yet, if the server goes before it has an end."""
    job = await services_of(request).jobs.get(request.path_params["id"], KIND, owner_of(request))
    if job is None:
        return encode_event("deleted", {"type": "deleted", "id": request.path_params["id"]}, event_id=_END)
    if not job.is_finished:
        return encode_event("error", shutting_down().body)
    return encode_event(
        job.status, {"type": job.status, "id": job.id, "video": await video_of(request, job)}, event_id=_END
    )


async def growing(live: LiveRequest, index: int, *, fps: float, quality: int) -> AsyncGenerator[bytes, None]:
    """The pieces of a file, from the first frame on; without an end if the job fails.

    :raises ApiError: it failed before there was a frame.
    """
    video, num_frames = None, 0
    with live.subscribe(ignores=(Progress, Preview)) as subscription:
        async for event in subscription:
            if event.output_index != index or not isinstance(event, Frames | Terminal):
                continue
            if isinstance(event, Failed | Cancelled) and video is None:
                raise from_event(event)
            if not isinstance(event, Frames | Completed):
                return
            frames = event.frames if isinstance(event, Frames) else event.frames[num_frames:]
            num_frames += len(frames)
            video = video or GrowingVideo(event.frames.shape[1:3], fps=fps, quality=quality)
            yield await run_sync(video.add, frames)
            if isinstance(event, Completed):
                yield await run_sync(video.close)


async def _joined(first: bytes, pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(pieces):
        yield first
        async for chunk in pieces:
            yield chunk
