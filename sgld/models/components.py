"""Loading one component by itself."""

import importlib
from dataclasses import replace
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError

from sgld.errors import ModelError
from sgld.models.blueprints import model_class, without_weights
from sgld.models.hub import http_error
from sgld.models.plan import ComponentPlan, Plan
from sgld.models.quantized import load_weights
from sgld.models.sources import ComponentSource
from sgld.models.tensor_files import load_parts
from sgld.models.tensor_layers import Team
from sgld.models.weight_files import Weights
from sgld.outcome import one_line

# What diffusers, transformers, torch and the hub raise for files that are missing, broken, or don't fit together.
LOAD_ERRORS = (
    OSError,
    ValueError,
    ImportError,
    AttributeError,
    TypeError,
    LookupError,
    RuntimeError,
    SafetensorError,
    http_error(),
)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_component(part: ComponentPlan, planned: Plan, rank: int = 0) -> Any:
    """A component from its own place, on the CPU.

    :param rank: that has it, or parts of it.
    :raises ModelError: it can't be loaded.
    """
    try:
        if part.has_parts and part.precision is not None:
            size = planned.config.parallel.tp_size
            return load_parts(_class(part), part.source, Team(rank % size, size), DTYPES[part.precision])
        if part.weights is not None and part.precision is not None:
            return _with_weights(part, part.weights, DTYPES[part.precision])
        return _loader(part)(_place(part.source).path, **_options(part, planned))
    except LOAD_ERRORS as error:
        raise ModelError(f"{part.name} can't be loaded from {part.source}: {one_line(error)}") from error


def stand_in(part: ComponentPlan) -> torch.nn.Module | None:
    """What stands for a component that a rank doesn't keep while its pipeline is made; None: it has to be loaded.

    Pipelines look at the configuration of their components.
    """
    is_known = part.precision is not None and part.auto_class is None
    cls = model_class(part.library, part.class_name) if is_known else None
    return without_weights(cls, part.source) if cls is not None else None


def _with_weights(part: ComponentPlan, weights: Weights, dtype: torch.dtype) -> torch.nn.Module:
    """A component of diffusers with weights from elsewhere, or that no loader of diffusers reads."""
    cls = _class(part)
    if not issubclass(cls, ModelMixin):
        raise ModelError(f"{part.name} is a {cls.__name__}; other weights are for models of diffusers only")
    source = part.source
    config = cls.load_config(source.path, subfolder=source.subfolder, revision=source.revision)
    return load_weights(cls, config, weights, part.quantization, dtype)


def _class(part: ComponentPlan) -> Any:
    from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj

    # It knows the classes that pipelines bring along, and older names of transformers' classes.
    return simple_get_class_obj(part.library, part.class_name)


def _loader(part: ComponentPlan) -> Any:
    """`from_pretrained` of its class."""
    if part.auto_class is not None:
        return getattr(importlib.import_module(part.library), part.auto_class).from_pretrained
    return _class(part).from_pretrained


def _place(source: ComponentSource) -> ComponentSource:
    """The source, a folder as such: diffusers looks for code in the place that the index of a model names."""
    return replace(source, path=str(source.folder), subfolder=None) if source.folder is not None else source


def _options(part: ComponentPlan, planned: Plan) -> dict[str, Any]:
    source = _place(part.source)
    given = {"subfolder": source.subfolder, "revision": source.revision, "variant": source.variant}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if part.precision is not None:
        options["dtype"] = DTYPES[part.precision]
    if part.auto_class is not None:
        options["trust_remote_code"] = planned.config.trust_remote_code
    return options
