"""How far a request is, in one value that is sent to clients: a pure function of its events."""

from collections import Counter
from itertools import count
from typing import Any, Literal, assert_never

import msgspec

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
    Stage,
    Started,
)
from sgld.media.inputs import references
from sgld.sampling_params import SamplingParams
from sgld.server.job_store import Job

State = Literal["queued", "running", "completed", "failed", "cancelled"]
ENDED: frozenset[State] = frozenset({"completed", "failed", "cancelled"})
# Of a prompt as of the other params: events stay small.
_MAX_CHARS = 600
CANCELLED = "cancelled"
"""The code of a job that was cancelled."""
# Not a choice of the client's, or said elsewhere.
_HIDDEN = frozenset({"prompt", "image_path", "num_previews", "num_outputs_per_prompt"})


class RequestError(msgspec.Struct, frozen=True, kw_only=True):
    """Why an output failed."""

    code: str
    message: str


class OutputStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One output of a request."""

    status: State = "queued"
    seed: int
    position: int | None = None
    """How many outputs wait before it."""
    step: int = 0
    num_steps: int | None = None
    stage: Stage = "denoise"
    """What the steps are of; while it is `postprocess`, denoising is done."""
    eta_s: float | None = None
    """Predicted seconds until it is completed, when this was said."""
    num_files: int = 0
    """How many pictures or videos it has; a picture with layers has several."""
    urls: tuple[str, ...] = ()
    """Where they are, once the whole request is completed."""
    error: RequestError | None = None

    @property
    def progress(self) -> float:
        if self.status in ENDED:
            return 1.0
        if self.stage == "postprocess":
            return 1.0
        return min(1.0, self.step / self.num_steps) if self.num_steps else 0.0


class RequestStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A request: what was asked, and how far it is. Times are seconds since 1970."""

    id: str
    object: Literal["request"] = "request"
    kind: Literal["image", "video"]
    status: State = "queued"
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    progress: float = 0.0
    """From 0 to 1, of all outputs."""
    position: int | None = None
    eta_s: float | None = None
    attempt: int = 1
    prompt: str
    """Its first 600 characters."""
    params: dict[str, Any]
    """What was chosen beside it; long values aren't shown."""
    outputs: tuple[OutputStatus, ...]
    error: RequestError | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED


class RequestProgress(msgspec.Struct, frozen=True, kw_only=True):
    """What changes of a request while it runs: the fields of `RequestStatus` with these names."""

    id: str
    status: State
    progress: float
    position: int | None
    eta_s: float | None
    started_at: float | None
    attempt: int
    outputs: tuple[OutputStatus, ...]


def new_status(request_id: str, kind: str, params: SamplingParams, now: float) -> RequestStatus:
    """A request of which nothing has been heard."""
    num_outputs = params.num_outputs_per_prompt
    return RequestStatus(
        id=request_id,
        kind="video" if kind == "video" else "image",
        created_at=now,
        prompt=params.prompt[:_MAX_CHARS],
        params=_shown(params),
        outputs=tuple(OutputStatus(seed=params.output(index).seed) for index in range(num_outputs)),
    )


def after(status: RequestStatus, event: AnyEvent, now: float) -> RequestStatus:
    """The request after an event."""
    index = event.output_index
    output = _output_after(status.outputs[index], event)
    outputs = (*status.outputs[:index], output, *status.outputs[index + 1 :])
    state = _state(outputs)
    if state == "completed":
        outputs = _with_urls(status, outputs)
    errors = [output.error for output in outputs if output.error]
    positions = [output.position for output in outputs if output.position is not None]
    etas = [output.eta_s for output in outputs if output.eta_s is not None]
    return msgspec.structs.replace(
        status,
        status=state,
        outputs=outputs,
        started_at=now if status.started_at is None and isinstance(event, Started) else status.started_at,
        ended_at=now if state in ENDED else None,
        progress=round(sum(output.progress for output in outputs) / len(outputs), 4),
        position=min(positions, default=None) if state == "queued" else None,
        eta_s=max(etas, default=None),
        attempt=event.attempt if isinstance(event, Restarted) else status.attempt,
        error=errors[0] if errors else None,
    )


def of_job(job: Job) -> RequestStatus:
    """A finished job, as its events would have told of it."""
    status = new_status(job.id, job.kind, job.asked.params, job.created_at)
    error = RequestError(code=job.error.code, message=job.error.message[:_MAX_CHARS]) if job.error else None
    state: State = "completed" if error is None else "cancelled" if error.code == CANCELLED else "failed"
    nums = Counter(file.seed for file in job.files)
    outputs = tuple(
        msgspec.structs.replace(output, status=state, num_files=nums[output.seed]) for output in status.outputs
    )
    return msgspec.structs.replace(
        status,
        status=state,
        progress=1.0,
        ended_at=job.completed_at,
        outputs=_with_urls(status, outputs) if state == "completed" else outputs,
        error=error if state == "failed" else None,
    )


def moved(status: RequestStatus, index: int, position: int) -> RequestStatus:
    """The request after others before it in the queue have begun or gone."""
    output = msgspec.structs.replace(status.outputs[index], position=position)
    outputs = (*status.outputs[:index], output, *status.outputs[index + 1 :])
    first = min((o.position for o in outputs if o.position is not None), default=None)
    return msgspec.structs.replace(status, outputs=outputs, position=first if status.status == "queued" else None)


def progress_of(status: RequestStatus) -> RequestProgress:
    """What changes of it while it runs."""
    return RequestProgress(**{name: getattr(status, name) for name in RequestProgress.__struct_fields__})


def _output_after(output: OutputStatus, event: AnyEvent) -> OutputStatus:
    replace = msgspec.structs.replace
    match event:
        case Queued(position=position, eta_s=eta_s):
            return replace(output, position=position, eta_s=eta_s)
        case Started():
            return replace(output, status="running", position=None)
        case Progress(step=step, num_steps=num_steps, eta_s=eta_s, stage=stage):
            return replace(output, step=step, num_steps=num_steps, eta_s=eta_s, stage=stage)
        case Restarted():
            return replace(output, status="queued", step=0, stage="denoise", eta_s=None)
        case Preview() | Frames():
            return output
        case Completed():
            num_files = 1 if event.is_video else len(event.frames)
            return replace(output, status="completed", position=None, eta_s=None, num_files=num_files)
        case Failed(code=code, message=message):
            error = RequestError(code=code, message=message[:_MAX_CHARS])
            return replace(output, status="failed", position=None, eta_s=None, error=error)
        case Cancelled():
            return replace(output, status="cancelled", position=None, eta_s=None)
        case unknown:
            assert_never(unknown)


def _state(outputs: tuple[OutputStatus, ...]) -> State:
    """Of the whole request: a failed output makes it a failed one, as its clients are told."""
    states = {output.status for output in outputs}
    if states <= ENDED:
        return next(state for state in ("failed", "cancelled", "completed") if state in states)
    return "queued" if states == {"queued"} else "running"


def _with_urls(status: RequestStatus, outputs: tuple[OutputStatus, ...]) -> tuple[OutputStatus, ...]:
    """Where the files are: pictures are counted through all outputs."""
    numbers = count()
    if status.kind == "video":
        video = f"/v1/videos/{status.id}/content?index="
        return tuple(msgspec.structs.replace(o, urls=(f"{video}{index}",)) for index, o in enumerate(outputs))
    base = f"/v1/images/{status.id}/content?variant="
    return tuple(
        msgspec.structs.replace(o, urls=tuple(f"{base}{next(numbers)}" for _ in range(o.num_files))) for o in outputs
    )


def _shown(params: SamplingParams) -> dict[str, Any]:
    """The choices that were made, without pictures and long values."""
    default = SamplingParams()
    chosen = {
        name: getattr(params, name)
        for name in SamplingParams.__struct_fields__
        if name not in _HIDDEN and getattr(params, name) != getattr(default, name)
    }
    if any(references(params.diffusers_kwargs)) or len(str(params.diffusers_kwargs)) > _MAX_CHARS:
        chosen.pop("diffusers_kwargs", None)
    if "negative_prompt" in chosen:
        chosen["negative_prompt"] = chosen["negative_prompt"][:_MAX_CHARS]
    if params.image_path:
        chosen["num_input_images"] = len(params.image_path)
    if params.num_frames == 1:
        del chosen["num_frames"]
    return chosen | {"seed": params.seed, "n": params.num_outputs_per_prompt}
