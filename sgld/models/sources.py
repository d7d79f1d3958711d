"""Where a component comes from and of which class it is, as its own files say, before it is loaded."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sgld.errors import ModelError
from sgld.models.resolve import INDEX_FILE, hub_file_if_any, is_hub_id
from sgld.outcome import one_line

# What classes are described by which file.
_CONFIG_FILES = (
    (r"Tokenizer", "tokenizer_config.json"),
    (r"Scheduler", "scheduler_config.json"),
    (r"Processor|Extractor", "preprocessor_config.json"),
    (r"", "config.json"),
)
# Where files of transformers name their class.
_CLASS_KEYS = ("tokenizer_class", "processor_class", "image_processor_type", "feature_extractor_type")


@dataclass(frozen=True)
class ComponentSource:
    """A folder or an id on the hub, and where in it; `variant` is a part of the names of its weights."""

    path: str
    subfolder: str | None = None
    revision: str | None = None
    variant: str | None = None

    def __str__(self) -> str:
        said = f"{self.path}/{self.subfolder}" if self.subfolder else self.path
        return " ".join([said, *(f"({value})" for value in (self.revision, self.variant) if value)])

    @property
    def folder(self) -> Path | None:
        """Where its files are; None: on the hub."""
        root = Path(self.path)
        return root / (self.subfolder or "") if root.is_dir() else None


@dataclass(frozen=True)
class ComponentClass:
    """A class of a library.

    `auto_class` is that which loads it if it is code that comes with the component, in the file `module`.py.
    """

    library: str
    name: str
    auto_class: str | None = None
    module: str | None = None


def find(name: str, path: str, named: ComponentClass | None) -> ComponentSource:
    """Where a component is that somebody named: all of a folder or repository, or its place in that of a model.

    :param named: the class that the model's index names.
    :raises ModelError: it isn't there.
    """
    root = ComponentSource(str(Path(path).expanduser()))
    if Path(root.path).is_file():
        raise ModelError(f"{name} can't be loaded from {path}: it is a file; give the folder of a complete component")
    is_model = _read(root, INDEX_FILE) is not None
    source = replace(root, subfolder=name) if is_model else root
    files = _config_files(named)
    if all(_read(source, file) is None for file in files):
        what = f"that model has no {name}" if is_model else f"there is no {' or '.join(files)}"
        where = "" if root.folder else ", or the hub can't be reached" if is_hub_id(path) else ", and no such folder"
        raise ModelError(f"{name} can't be loaded from {path}: {what}{where}")
    return source


def with_variant(source: ComponentSource, variant: str | None) -> ComponentSource:
    """The source, with the variant if it has weights of that: often only some components do."""
    has_it = variant and source.folder and any(source.folder.glob(f"*.{variant}[.-]*"))
    return replace(source, variant=variant) if has_it else source


def own_code(source: ComponentSource) -> ComponentClass | None:
    """The class of a component whose code comes with it."""
    config = _read(source, "config.json")
    return _class_in(config, None) if config is not None and "auto_map" in config else None


def class_of(name: str, source: ComponentSource, named: ComponentClass | None) -> ComponentClass:
    """The class that a component's own files name, else that of the model's index.

    :raises ModelError: neither names one.
    """
    configs = [config for file in _config_files(named) if (config := _read(source, file)) is not None]
    found = next(filter(None, (_class_in(config, named) for config in configs)), named)
    if found is None:
        raise ModelError(f"{name} can't be loaded from {source}: its files don't name its class")
    return found


def config_of(source: ComponentSource, named: ComponentClass | None = None) -> dict[str, Any] | None:
    """The config.json of a component, or the file that describes one of this class; None if there is none.

    :raises ModelError: it can't be read.
    """
    return _read(source, _config_files(named)[0] if named is not None else "config.json")


def _config_files(named: ComponentClass | None) -> Sequence[str]:
    if named is None:
        return [file for _, file in reversed(_CONFIG_FILES)]
    return [next(file for pattern, file in _CONFIG_FILES if re.search(pattern, named.name))]


def _class_in(config: dict[str, Any], named: ComponentClass | None) -> ComponentClass | None:
    """The class that a file names; of transformers that of the index, if it reads such files, maybe a part of them."""
    if auto_map := config.get("auto_map"):
        auto_class, reference = next(iter(auto_map.items()))
        reference = next(filter(None, reference)) if isinstance(reference, list) else reference
        library = "diffusers" if auto_class == "AutoModel" and "model_type" not in config else "transformers"
        module, _, name = str(reference).rpartition(".")
        return ComponentClass(library, name, auto_class, module)
    if class_name := config.get("_class_name"):
        return ComponentClass("diffusers", str(class_name))
    if named is not None and named.library == "transformers" and _reads(named.name, config):
        return named
    names = [*(config.get("architectures") or ()), *(config[key] for key in _CLASS_KEYS if config.get(key))]
    return ComponentClass("transformers", str(names[0])) if names else None


def _reads(class_name: str, config: dict[str, Any]) -> bool:
    """Whether a class of transformers is for models of this kind."""
    import transformers  # takes a second

    kind = getattr(getattr(transformers, class_name, None), "config_class", None)
    return "model_type" in config and getattr(kind, "model_type", None) == config["model_type"]


def _read(source: ComponentSource, file: str) -> dict[str, Any] | None:
    """A JSON file of a component; None if there is none.

    :raises ModelError: it can't be read.
    """
    try:
        folder, place = source.folder, f"{source.subfolder}/{file}" if source.subfolder else file
        on_hub = folder is None and is_hub_id(source.path)
        path = hub_file_if_any(source.path, place, source.revision) if on_hub else (folder or Path()) / file
        return dict(json.loads(path.read_text())) if path is not None and path.is_file() else None
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{file} of {source} can't be read: {one_line(error)}") from None
