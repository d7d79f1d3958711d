"""Modular pipelines: blocks that share a state, and components that each may come from a place of their own."""

import warnings
from pathlib import Path
from typing import Any

from diffusers import ModularPipeline

from sgld.errors import ModelError
from sgld.models.resolve import ModelSource


def load_modular(
    source: ModelSource,
    parts: dict[str, Any],
    *,
    revision: str | None,
    trust_remote_code: bool,
    dtype: Any,
    variants: dict[str, str],
) -> Any:
    """A modular pipeline with all of its components.

    :param parts: components that are loaded already.
    :param variants: those of the weights of components that have one.
    :raises ModelError: one of these can't be loaded.
    """
    pipeline = ModularPipeline.from_pretrained(
        source.pretrained_name, revision=revision, trust_remote_code=trust_remote_code
    )
    if source.folder is not None:
        _take_from_folder(pipeline, source.folder)
    pipeline.update_components(**parts)
    # diffusers only warns of a component that it can't load; the first line of the traceback's end says why.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        pipeline.load_components(dtype=dtype, variant=variants)
    missing = [name for name, spec in _loadable(pipeline).items() if getattr(pipeline, name, None) is None]
    if missing:
        places = ", ".join(f"{name} ({_loadable(pipeline)[name].pretrained_model_name_or_path})" for name in missing)
        raise ModelError(f"{source.model_path} can't be loaded: these components can't be had: {places}")
    return pipeline


def _loadable(pipeline: Any) -> dict[str, Any]:
    """The specifications of the components that have weights or files."""
    specs: dict[str, Any] = pipeline._component_specs
    return {
        name: spec
        for name, spec in specs.items()
        if spec.default_creation_method == "from_pretrained" and spec.pretrained_model_name_or_path is not None
    }


def _take_from_folder(pipeline: Any, folder: Path) -> None:
    """Components that lie beside the index come from there: it holds the path where it was saved."""
    for name, spec in pipeline._component_specs.items():
        if spec.default_creation_method == "from_pretrained" and (folder / name).is_dir():
            spec.pretrained_model_name_or_path, spec.subfolder = str(folder), name
