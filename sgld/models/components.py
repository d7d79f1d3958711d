"""Loading one component by itself."""

import importlib
from typing import Any

import torch
from safetensors import SafetensorError

from sgld.errors import ModelError
from sgld.models.plan import ComponentPlan, Plan
from sgld.models.resolve import one_line

# What diffusers, transformers and torch raise for files that are missing, broken, or don't fit together.
LOAD_ERRORS = (
    OSError,
    ValueError,
    ImportError,
    AttributeError,
    TypeError,
    KeyError,
    RuntimeError,
    SafetensorError,
)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_component(part: ComponentPlan, planned: Plan) -> Any:
    """A component from its own place, on the CPU.

    :raises ModelError: it can't be loaded.
    """
    try:
        return _loader(part)(part.source.path, **_options(part, planned))
    except LOAD_ERRORS as error:
        raise ModelError(f"{part.name} can't be loaded from {part.source}: {one_line(error)}") from error


def _loader(part: ComponentPlan) -> Any:
    """`from_pretrained` of its class."""
    from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj

    if part.auto_class is not None:
        return getattr(importlib.import_module(part.library), part.auto_class).from_pretrained
    # It knows the classes that pipelines bring along, and older names of transformers' classes.
    return simple_get_class_obj(part.library, part.class_name).from_pretrained


def _options(part: ComponentPlan, planned: Plan) -> dict[str, Any]:
    source = part.source
    given = {"subfolder": source.subfolder, "revision": source.revision, "variant": source.variant}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if part.precision is not None:
        options["dtype"] = DTYPES[part.precision]
    if part.auto_class is not None:
        options["trust_remote_code"] = planned.config.trust_remote_code
    return options
