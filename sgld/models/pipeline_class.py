"""Which class a pipeline has: that of the model's index, another one of diffusers, or code of its own."""

import difflib
import json
from pathlib import Path
from typing import Any

from sgld.config import EngineConfig
from sgld.errors import ModelError
from sgld.models.resolve import ModelSource, is_modular
from sgld.outcome import one_line


def with_class(config: EngineConfig, source: ModelSource, index: dict[str, Any]) -> dict[str, Any]:
    """The index with the class that was chosen; of code of its own (file, class or where it is from).

    :raises ModelError: there is no such class, or it is code that isn't trusted.
    """
    chosen, custom = config.source.pipeline_class_name, config.source.custom_pipeline
    if (chosen or custom) and is_modular(index):
        raise ModelError(f"{config.model_path} is a modular pipeline; its class can't be chosen")
    _check_blocks(config, source)
    if chosen and custom:
        raise ModelError("pipeline_class_name and custom_pipeline can't be given together: both choose a class")
    if chosen:
        _check_known(chosen)
        return index | {"_class_name": chosen}
    if custom:
        _check_trusted(config, f"the pipeline {custom} is code from outside of diffusers")
        _check_folder(custom)
        return index | {"_class_name": ["pipeline", custom]}
    named = index.get("_class_name")
    if not named:
        raise ModelError(f"model_index.json of {config.model_path} names no pipeline class (_class_name)")
    if isinstance(named, list):
        _check_trusted(config, f"{config.model_path} has a pipeline class of its own, {named[-1]} in {named[0]}.py")
        if source.folder is not None:
            _check_there(config, source.folder / f"{named[0]}.py", named[-1])
    return index


def class_name(index: dict[str, Any]) -> str:
    """The name of the class for people."""
    named = index["_class_name"]
    return str(named[-1] if isinstance(named, list) else named)


def _check_blocks(config: EngineConfig, source: ModelSource) -> None:
    """:raises ModelError: a modular pipeline brings blocks along that aren't trusted, or whose code isn't there."""
    file = source.folder / "modular_config.json" if source.folder is not None else None
    if file is None or not file.is_file():
        return
    try:
        reference = json.loads(file.read_text()).get("auto_map", {}).get("ModularPipelineBlocks")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{file.name} of {config.model_path} can't be read: {one_line(error)}") from None
    if reference:
        module, _, name = str(reference).rpartition(".")
        _check_trusted(config, f"{config.model_path} has blocks of its own, {name} in {module}.py")
        _check_there(config, file.parent / f"{module}.py", name)


def _check_there(config: EngineConfig, file: Path, name: str) -> None:
    if not file.is_file():
        raise ModelError(f"{config.model_path} has no {file.name}, where its class {name} should be")


def _check_known(name: str) -> None:
    import diffusers  # takes seconds

    if not name.endswith("Pipeline") or not hasattr(diffusers, name):
        known = [other for other in dir(diffusers) if other.endswith("Pipeline")]
        close = difflib.get_close_matches(name, known, n=1)
        raise ModelError(f"diffusers has no pipeline {name!r}" + (f"; did you mean {close[0]}?" if close else ""))


def _check_trusted(config: EngineConfig, what: str) -> None:
    if not config.trust_remote_code:
        raise ModelError(f"{what}; allow it with --trust-remote-code")


def _check_folder(custom: str) -> None:
    path = Path(custom).expanduser()
    if path.is_dir() and not (path / "pipeline.py").is_file():
        raise ModelError(f"{custom} has no pipeline.py")
