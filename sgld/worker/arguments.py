"""From what a client chose to the keyword arguments of a pipeline's `__call__`, by its signature."""

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import diffusers
import torch

from sgld.errors import InvalidRequest
from sgld.media.images import load_image
from sgld.media.inputs import references, replaced
from sgld.sampling_params import SamplingParams

# Fields that the pipeline gets under their own name, if it has such a parameter.
_NAMED = (
    "negative_prompt",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
    "true_cfg_scale",
    "guidance_rescale",
    "max_sequence_length",
)
# How a result comes back, how many there are, where noise comes from, and functions, which JSON doesn't have.
_OWNED = re.compile(r"output_type|return_dict|generator|callback\w*|num_\w+_per_prompt")
# Pipelines, and image processors of transformers, take text there for a file or URL, and read it, whoever wrote it.
_MEDIA = re.compile(r"(.*_)?(audio|frame|image|img|mask|picture|video)s?(_\d+)?|(.*_)?(file|path|url)s?")

_UNDECLARED = inspect.Parameter.empty


def arguments(
    pipeline: Any, params: SamplingParams, defaults: Mapping[str, Any], images: Sequence[Any]
) -> dict[str, Any]:
    """The keyword arguments of one request.

    :param defaults: what the model's author recommends, by parameter name; used where the client chose nothing.
    :raises InvalidRequest: the pipeline has no parameter for something that the client chose.
    """
    accepted = parameters_of(pipeline)
    chosen = {name: value for name in _NAMED if (value := getattr(params, name)) is not None}
    chosen |= _prompt(params, accepted) | _images(images) | _video(params, accepted)
    chosen |= _extra(params, accepted)
    if "mask_image" in chosen and "image" in accepted and "image" not in chosen:
        raise InvalidRequest("there is a mask_image, but no picture that it belongs to; give image_path", "image_path")
    for name in chosen:
        if name not in accepted:
            raise InvalidRequest(f"{type(pipeline).__name__} takes no {name}; it takes {', '.join(accepted)}", name)
    recommended = {name: value for name, value in defaults.items() if name in accepted}
    ours = {"generator": _generator(params), "output_type": _output_type(pipeline)}
    return recommended | chosen | {name: value for name, value in ours.items() if name in accepted}


def _output_type(pipeline: Any) -> str:
    """Tensors of values from 0 to 1 where a processor of diffusers makes the outputs.

    Pipelines that do so themselves, as those of Kandinsky 2.2, may give tensors as their decoder has them.
    """
    is_processed = any(getattr(pipeline, name, None) is not None for name in ("image_processor", "video_processor"))
    return "pt" if is_processed or hasattr(pipeline, "default_call_parameters") else "np"


def with_pictures(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with pictures in the place of references to files.

    :raises InvalidRequest: one can't be read.
    """
    return {name: replaced(value, lambda r: load_image(Path(r.source), r.mode)) for name, value in kwargs.items()}


def parameters_of(pipeline: Any) -> dict[str, inspect.Parameter]:
    """What the pipeline's `__call__` takes by name; a modular one takes what its blocks take.

    A class that takes any keyword hands them on to the one that it is derived from.
    """
    of_blocks = getattr(pipeline, "default_call_parameters", None)
    if of_blocks is not None:
        # One without a name stands for whatever else is given.
        named = {name: default for name, default in of_blocks.items() if name is not None}
        # Few blocks declare types; the pipeline without blocks of the same model does.
        whole = getattr(diffusers, type(pipeline).__name__.replace("ModularPipeline", "Pipeline"), type(pipeline))
        declared = {name: parameter.annotation for name, parameter in _of_call(whole).items()}
        of_name = partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
        return {n: of_name(n, default=d, annotation=declared.get(n, _UNDECLARED)) for n, d in named.items()}
    return _of_call(type(pipeline))


def _of_call(pipeline: type) -> dict[str, inspect.Parameter]:
    found: dict[str, inspect.Parameter] = {}
    for call in (vars(base)["__call__"] for base in pipeline.__mro__ if "__call__" in vars(base)):
        _self, *parameters = inspect.signature(call).parameters.values()
        found = {p.name: p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} | found
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return found


def num_steps(pipeline: Any, kwargs: Mapping[str, Any]) -> int:
    """How many steps a request has, as far as its arguments tell; 0 if they don't."""
    parameter = parameters_of(pipeline).get("num_inference_steps")
    steps = kwargs.get("num_inference_steps", parameter.default if parameter else 0)
    return steps if isinstance(steps, int) else 0


def _prompt(params: SamplingParams, accepted: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": params.prompt} if params.prompt or "prompt" in accepted else {}


def _images(images: Sequence[Any]) -> dict[str, Any]:
    return {"image": images[0] if len(images) == 1 else list(images)} if images else {}


def _video(params: SamplingParams, accepted: Mapping[str, Any]) -> dict[str, Any]:
    """One frame is a picture, and the frame rate concerns only pipelines that know of it."""
    chosen: dict[str, Any] = {}
    if params.num_frames is not None and (params.num_frames > 1 or "num_frames" in accepted):
        chosen["num_frames"] = params.num_frames
    rate = next((name for name in ("fps", "frame_rate") if name in accepted), None)
    if params.fps is not None and rate is not None:
        chosen[rate] = params.fps
    return chosen


def _extra(params: SamplingParams, accepted: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    for name, value in params.diffusers_kwargs.items():
        if _OWNED.fullmatch(name):
            raise InvalidRequest(f"diffusers_kwargs.{name} is set by sgld itself; leave it out", "diffusers_kwargs")
        if name in params.__struct_fields__:
            raise InvalidRequest(f"diffusers_kwargs.{name}: give {name} itself instead", "diffusers_kwargs")
        if name not in accepted:
            close = difflib.get_close_matches(name, accepted, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; it takes {', '.join(accepted)}"
            raise InvalidRequest(
                f"diffusers_kwargs.{name}: the pipeline has no such parameter{hint}", "diffusers_kwargs"
            )
        if _MEDIA.fullmatch(name) and _has_text(replaced(value, lambda _: None)):
            raise InvalidRequest(
                f'diffusers_kwargs.{name} holds text; a picture is written as {{"$image": "..."}}', "diffusers_kwargs"
            )
    return {name: _as_declared(accepted[name], value) for name, value in params.diffusers_kwargs.items()}


def _as_declared(parameter: inspect.Parameter, value: Any) -> Any:
    """A value of JSON, which has lists where pipelines declare pairs.

    :raises InvalidRequest: the pipeline declares a tensor, which JSON doesn't have.
    """
    declared = parameter.annotation
    kinds = set(get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)) - {NoneType}
    # Numbers go on: some pipelines declare those as tensors.
    if kinds and all(map(_is_tensor, kinds)) and isinstance(value, list) and not any(references(value)):
        raise InvalidRequest(
            f"diffusers_kwargs.{parameter.name} is a tensor for the pipeline, which can't be sent", "diffusers_kwargs"
        )
    is_tuple = isinstance(parameter.default, tuple) or {get_origin(kind) for kind in kinds} == {tuple}
    return tuple(value) if is_tuple and isinstance(value, list) else value


def _is_tensor(kind: Any) -> bool:
    """Whether a parameter of this kind gets a tensor, or a list of some."""
    parts = get_args(kind) if get_origin(kind) is list else (kind,)
    return all(getattr(part, "__name__", "").endswith("Tensor") for part in parts)


def _has_text(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, str) or any(map(_has_text, parts))


def _generator(params: SamplingParams) -> torch.Generator:
    """:raises InvalidRequest: there is no such device here."""
    if params.generator_device == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("generator_device is 'cuda', but torch finds no GPU here", "generator_device")
    return torch.Generator(params.generator_device).manual_seed(params.seed)
