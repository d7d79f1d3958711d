"""Loading a pipeline whose weights are in one file."""

from typing import Any

import diffusers
import torch
from diffusers.loaders import single_file_utils
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj

from sgld.errors import ModelError
from sgld.models.components import DTYPES, load_component
from sgld.models.plan import Plan
from sgld.models.single_file import shapes_in
from sgld.outcome import one_line


def load_from_file(planned: Plan, parts: dict[str, Any]) -> Any:
    """A pipeline from one file of weights and the configuration of its components.

    :param parts: components that are loaded already.
    :raises ModelError: such pipelines aren't made from one file, or it doesn't have all weights.
    """
    source, dtypes = (
        planned.source,
        {part.name: DTYPES[part.precision] for part in planned.components if part.precision},
    )
    cls = getattr(diffusers, planned.pipeline_class)
    if not hasattr(cls, "from_single_file"):
        raise ModelError(f"{source.model_path} can't be loaded: {planned.pipeline_class} isn't made from a single file")
    # The loader knows one dtype for all; a cast down loses what a cast up can't bring back.
    dtype = next(iter(dtypes.values())) if len(set(dtypes.values())) == 1 else torch.float32
    given = {"config": source.pretrained_name, "torch_dtype": dtype, **_text_encoders(planned, parts), **parts}
    try:
        pipeline = cls.from_single_file(str(source.file), **given)
    except single_file_utils.SingleFileComponentError as error:
        hint = "where a component isn't in the file, say with --<component>-path where it is"
        raise ModelError(f"{source.model_path} can't be loaded: {one_line(error)} ({hint})") from error
    for name in dtypes.keys() - given.keys():
        if isinstance(component := getattr(pipeline, name, None), torch.nn.Module):
            component.to(dtypes[name])
    return pipeline


def _text_encoders(planned: Plan, parts: dict[str, Any]) -> dict[str, Any]:
    """The models of transformers that aren't in the file: diffusers doesn't find their weights beside their configs."""
    assert planned.source.file is not None
    tensors = shapes_in(planned.source.file)
    found: dict[str, Any] = {}
    for part in planned.components:
        if part.library != "transformers" or part.precision is None or part.name in parts:
            continue
        cls = simple_get_class_obj(part.library, part.class_name)
        is_clip = single_file_utils.is_clip_model_in_single_file(cls, tensors)
        if not is_clip and not single_file_utils.is_t5_in_single_file(tensors):
            found[part.name] = load_component(part, planned)
    return found
