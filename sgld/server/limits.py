"""What a single request may ask for at most."""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from anyio.to_thread import run_sync
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sgld.config import ServerConfig
from sgld.errors import InvalidRequest
from sgld.media.inputs import InputPolicy, has_pictures, references, scheme_of, shown
from sgld.messages import ModelInfo
from sgld.models.lookup import is_hub_id, place
from sgld.request import NO_LIMITS, Limits
from sgld.sampling_params import LANCZOS, OPTICAL_FLOW, RIFE_REPO, UPSCALING_REPO, LoraChoice, SamplingParams
from sgld.server.errors import ApiError

# Arguments of pipelines that hold a value for each step.
_SCHEDULES = ("timesteps", "sigmas")
_DEFAULT_REPOS = (RIFE_REPO, UPSCALING_REPO)


def check_limits(
    params: SamplingParams, config: ServerConfig, model: ModelInfo | None = None, limits: Limits = NO_LIMITS
) -> None:
    """Refuse what is larger than the operator allows, as far as that can be told before it is made.

    :param model: its defaults count where nothing is chosen.
    :param limits: those of what is asked for, beside the operator's.
    :raises InvalidRequest: names the field, its value and the limit.
    """
    for field, what, value, limit in _measured(params, config):
        if value > limit:
            raise InvalidRequest(f"{what} is {value}; this server allows at most {limit}", field)
    limits_of(config).also(limits).check_asked(
        params,
        model.call_defaults if model is not None else {},
        has_pictures=has_pictures(params),
        makes_videos=model is None or model.makes_videos,
    )


def limits_of(config: ServerConfig) -> Limits:
    """What a rank checks, too: while a model is loaded nobody else knows its defaults."""
    return Limits(max_pixels=config.max_pixels, max_frames=config.max_frames, max_steps=config.max_steps)


def _measured(params: SamplingParams, config: ServerConfig) -> Iterator[tuple[str, str, int, int]]:
    """Field, what is measured, its value, its limit."""
    yield "n", "the number of outputs", params.num_outputs_per_prompt, config.max_outputs
    yield "prompt", "the length of the prompt", len(params.prompt), config.max_prompt_chars
    yield "negative_prompt", "its length", len(params.negative_prompt or ""), config.max_prompt_chars
    for name in _SCHEDULES:
        schedule = params.diffusers_kwargs.get(name)
        num_steps = len(schedule) if isinstance(schedule, list) else 0
        yield "diffusers_kwargs", f"the number of {name}", num_steps, config.max_steps


def number_in(text: str, limit: int) -> int | None:
    """The number from 0 to below `limit` that a text of a client's is; None if it is none."""
    is_number = text.isascii() and text.isdecimal()
    return int(text) if is_number and len(text) <= len(str(limit)) and int(text) < limit else None


async def check_sources(params: SamplingParams, config: ServerConfig) -> None:
    """Refuse files of this machine, unless the operator named a folder above them, and what needs a download.

    :raises InvalidRequest: names the file.
    """
    await run_sync(_check_filters, params, config)
    policy = InputPolicy(allow_files=bool(config.allow_path))
    sources = [*params.image_path, *(reference.source for reference in references(params.diffusers_kwargs))]
    files = [source for source in sources if scheme_of(source, policy) == "file"]
    if files:
        await run_sync(_check_files, files, config.allow_path)


async def check_adapters(choices: Iterable[LoraChoice], config: ServerConfig, known: Collection[str]) -> None:
    """Refuse LoRA adapters that are neither `known` nor where the operator lets clients name some.

    :raises InvalidRequest: names the path.
    """
    paths = [choice.path for choice in choices if choice.path is not None and choice.path not in known]
    if paths:
        await run_sync(_check_adapter_paths, paths, config)


def _check_adapter_paths(paths: list[str], config: ServerConfig) -> None:
    for path in paths:
        flag = "" if config.allow_lora_download else "--allow-lora-download"
        _check_place(path, f"the LoRA adapter {shown(path)}", "lora", flag, config.allow_path)


def _check_filters(params: SamplingParams, config: ServerConfig) -> None:
    """The weights of interpolation and upscaling are those that are meant by default, or where the operator allows."""
    for field in ("frame_interpolation_model_path", "upscaling_model_path"):
        path: str | None = getattr(params, field)
        repo = path.partition(":")[0] if path else ""
        if path is None or path in (OPTICAL_FLOW, LANCZOS) or (place(path) is None and repo in _DEFAULT_REPOS):
            continue
        if "://" in path:
            raise InvalidRequest(f"{field} is {shown(path)}: requests can't name addresses", field)
        flag = "" if config.allow_filter_download else "--allow-filter-download"
        _check_place(path, f"{field}: {shown(path)}", field, flag, config.allow_path)


def _check_place(path: str, called: str, field: str, missing_flag: str, folders: tuple[str, ...]) -> None:
    """See that a file of weights is where requests may name some.

    :param missing_flag: what the operator would have to give for what isn't here; empty: it is given.
    """
    found = place(path)
    if found is None and is_hub_id(path.partition(":")[0]):
        if missing_flag:
            raise InvalidRequest(
                f"{called} isn't here, and clients may not have any downloaded ({missing_flag})", field
            )
    elif found is None or not _is_allowed(found, folders):
        raise InvalidRequest(f"{called} {_where_not(path, folders)}", field)


def _where_not(path: str, folders: tuple[str, ...]) -> str:
    """Whether there is a file is said of the folders only that clients may name."""
    return "isn't there" if _is_allowed(Path(path), folders) else "is in none of the folders that this server reads"


def _is_allowed(file: Path, folders: tuple[str, ...]) -> bool:
    return any(file.resolve().is_relative_to(Path(folder).resolve()) for folder in folders)


def _check_files(files: list[str], folders: tuple[str, ...]) -> None:
    for file in files:
        if not _is_allowed(Path(file), folders):
            raise InvalidRequest(f"the file {shown(file)} is in none of the folders that this server reads")


class BodyLimit:
    """Middleware that stops reading bodies that are too large."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse what says that it is too large, and raise inside the handler where it turns out to be."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_bytes:
            await self._too_large().response(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> ApiError:
        message = f"the request has more than {self._max_bytes} bytes; send less, or pictures by URL"
        return ApiError(413, message, "request_too_large")
