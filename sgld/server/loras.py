"""LoRA adapters over HTTP: SGLang's endpoints, and one to unload. What requests choose themselves comes with them."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from sgld.engine.loras import ALL, Loras
from sgld.errors import InvalidRequest
from sgld.sampling_params import LoraChoice, SamplingParams
from sgld.server.bodies import read_json
from sgld.server.errors import ApiError, json_response
from sgld.server.info import check_ready
from sgld.server.limits import check_adapters
from sgld.server.services import Services, services_of

_Target = Annotated[str, Meta(max_length=100)]


class SetLora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Adapters for requests that choose none. Of several each has its own value in a list, or all have one."""

    lora_nickname: Annotated[str | list[str], Meta(description="names by which requests choose them")]
    lora_path: Annotated[
        str | list[str | None] | None, Meta(description="file, folder or hub id; without one it was loaded before")
    ] = None
    target: Annotated[_Target | list[_Target], Meta(description="the component that is changed, or all")] = ALL
    strength: Annotated[float | list[float], Meta(description="scale")] = 1.0
    merge_mode: Annotated[
        Literal["auto", "merge", "dynamic"] | None, Meta(description="without effect: no weights are changed")
    ] = None
    lora_alpha: Annotated[float, Meta(gt=0, description="where the adapter doesn't say")] | None = None


class SwitchLora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether requests that choose none have the adapters that were set."""

    target: Annotated[_Target | list[_Target], Meta(description="all; components aren't switched one by one")] = ALL
    strength: Annotated[float | None, Meta(description="their scale from now on")] = None


class UnloadLora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An adapter to forget."""

    lora_nickname: str


class LoraDone(msgspec.Struct, frozen=True, kw_only=True):
    """It was done."""

    status: Literal["ok"] = "ok"
    message: str


class LoadedAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter with a name; sizes are null before it was needed."""

    nickname: str
    path: str
    size_bytes: int | None
    num_layers: dict[str, int]
    num_unmatched: int


class ActiveAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that requests get, in SGLang's words."""

    nickname: str | None
    nicknames: list[str | None]
    path: str | None
    merged: Literal[False] = False
    mode: Literal["dynamic"] = "dynamic"
    strength: float
    strengths: list[float]


class LoraList(msgspec.Struct, frozen=True, kw_only=True):
    """The adapters that have names, and by component those that requests get."""

    loaded_adapters: list[LoadedAdapter]
    active: dict[str, list[ActiveAdapter]]


async def set_lora(request: Request) -> Response:
    """POST /v1/set_lora: adapters for requests that choose none."""
    services = services_of(request)
    asked = msgspec.convert(await read_json(request), SetLora)
    choices = _choices(asked)
    check_ready(services)
    await check_adapters(choices, services.config, _known_paths(services))
    targets = {choice.target for choice in choices}
    await services.engine.loras.set(choices, targets.pop() if len(targets) == 1 else ALL)
    names = ", ".join(choice.nickname or "" for choice in choices)
    return json_response(LoraDone(message=f"LoRA adapters set: {names}"))


async def merge_lora_weights(request: Request) -> Response:
    """POST /v1/merge_lora_weights: make the adapters that were set active again."""
    asked = msgspec.convert(await _optional_json(request), SwitchLora)
    _check_all(asked)
    services_of(request).engine.loras.switch(is_on=True, strength=asked.strength)
    return json_response(LoraDone(message="LoRA adapters are active"))


async def unmerge_lora_weights(request: Request) -> Response:
    """POST /v1/unmerge_lora_weights: requests that choose no adapters get none."""
    asked = msgspec.convert(await _optional_json(request), SwitchLora)
    _check_all(asked)
    services_of(request).engine.loras.switch(is_on=False)
    return json_response(LoraDone(message="LoRA adapters aren't active"))


async def list_loras(request: Request) -> Response:
    """GET /v1/list_loras: adapters, and which of them are active."""
    return json_response(_listed(services_of(request).engine.loras.known))


async def unload_lora(request: Request) -> Response:
    """POST /v1/unload_lora: forget an adapter."""
    return _unload(request, msgspec.convert(await read_json(request), UnloadLora).lora_nickname)


async def delete_lora(request: Request) -> Response:
    """DELETE /v1/loras/{nickname}: forget an adapter."""
    return _unload(request, request.path_params["nickname"])


async def with_adapters(services: Services, params: SamplingParams) -> SamplingParams:
    """The params with the adapters that they get, and where these are.

    :raises InvalidRequest: there is none of this name, or one from where clients may not name any.
    """
    await check_adapters(params.lora or (), services.config, _known_paths(services))
    return services.engine.loras.resolved(params)


def _known_paths(services: Services) -> set[str]:
    return {adapter.path for adapter in services.engine.loras.known.registered}


def _choices(asked: SetLora) -> list[LoraChoice]:
    names = asked.lora_nickname if isinstance(asked.lora_nickname, list) else [asked.lora_nickname]
    paths = asked.lora_path if isinstance(asked.lora_path, list) else [asked.lora_path] * len(names)
    scales = asked.strength if isinstance(asked.strength, list) else [asked.strength] * len(names)
    targets = asked.target if isinstance(asked.target, list) else [asked.target] * len(names)
    lists = {"lora_path": len(paths), "strength": len(scales), "target": len(targets)}
    for field, num in lists.items():
        if num != len(names):
            raise InvalidRequest(f"{field} has {num} values for {len(names)} nicknames", field)
    if len(set(names)) < len(names) or not names:
        raise InvalidRequest("lora_nickname must name adapters, each once", "lora_nickname")
    if isinstance(asked.lora_path, str) and len(names) > 1:
        raise InvalidRequest(f"lora_path is one path for {len(names)} nicknames; give a list", "lora_path")
    fields = [
        {"nickname": name, "path": path, "scale": scale, "target": target, "alpha": asked.lora_alpha}
        for name, path, scale, target in zip(names, paths, scales, targets, strict=True)
    ]
    return msgspec.convert(fields, list[LoraChoice])


def _check_all(asked: SwitchLora) -> None:
    if asked.target not in (ALL, [ALL]):
        raise InvalidRequest(
            f"target is {asked.target!r}; only 'all' is switched, or set others with /v1/set_lora", "target"
        )


async def _optional_json(request: Request) -> dict[str, object]:
    return await read_json(request) if await request.body() else {}


def _unload(request: Request, nickname: str) -> Response:
    try:
        services_of(request).engine.loras.unload(nickname)
    except InvalidRequest as error:
        raise ApiError(404, str(error), "not_found", param="lora_nickname") from None
    return json_response(LoraDone(message=f"LoRA adapter unloaded: {nickname}"))


def _listed(known: Loras) -> LoraList:
    fields = LoadedAdapter.__struct_fields__
    loaded = [LoadedAdapter(**{n: getattr(adapter, n) for n in fields}) for adapter in known.registered]
    layers = {(adapter.path, adapter.alpha): adapter.num_layers for adapter in known.registered}
    active: dict[str, list[ActiveAdapter]] = {}
    for choice in known.active:
        components = layers.get((choice.path or "", choice.alpha), {})
        for component in components if choice.target == ALL else (choice.target,):
            active.setdefault(component, []).append(
                ActiveAdapter(
                    nickname=choice.nickname,
                    nicknames=[choice.nickname],
                    path=choice.path,
                    strength=choice.scale,
                    strengths=[choice.scale],
                )
            )
    return LoraList(loaded_adapters=loaded, active=active)
