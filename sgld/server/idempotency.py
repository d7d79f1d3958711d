"""`Idempotency-Key`: a request that is sent again is the same job."""

import hashlib

import msgspec
from anyio.to_thread import run_sync
from starlette.requests import Request

from sgld.server.auth import owner_of
from sgld.server.errors import ApiError
from sgld.server.job_store import Asked, Job, KeyReused
from sgld.server.loras import with_adapters
from sgld.server.services import services_of

_MAX_CHARS = 255


def idempotency_key(request: Request) -> str | None:
    """The key that the client gave, if it did.

    :raises ApiError: it can't be one.
    """
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= _MAX_CHARS:
        message = f"an Idempotency-Key has 1 to {_MAX_CHARS} characters, this one has {len(key)}"
        raise ApiError(400, message, "invalid_value", param="Idempotency-Key")
    return key


async def submit_job(request: Request, kind: str, asked: Asked) -> Job:
    """Accept a job with the adapters that it gets, or find the one that the client's key stands for.

    :raises ApiError: the key stands for another one.
    :raises SgldError: the job is refused.
    """
    key, services = idempotency_key(request), services_of(request)
    # Of what was said: when it is said again, others may be active.
    body_hash = await run_sync(_hash, request.url.path, asked) if key is not None else None
    params = await with_adapters(services, asked.params)
    # Whoever is told none now has none, also when the job runs after a restart with others.
    asked = msgspec.structs.replace(asked, params=msgspec.structs.replace(params, lora=params.lora or ()))
    try:
        return await services.jobs.submit(kind, owner_of(request), asked, key=key, body_hash=body_hash)
    except KeyReused:
        message = f"the Idempotency-Key {key!r} was used for another request; choose a new one"
        raise ApiError(422, message, "idempotency_key_reused", param="Idempotency-Key") from None


def _hash(path: str, asked: Asked) -> str:
    """Equal for what is equal; a seed that the client gave is among the options."""
    params = msgspec.structs.replace(asked.params, seed=0)
    body = [path, msgspec.structs.replace(asked, params=params)]
    return hashlib.sha256(msgspec.json.encode(body, order="deterministic")).hexdigest()
