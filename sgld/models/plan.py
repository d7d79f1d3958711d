"""What is loaded, from where and in what form: decided from the config and the model's files, before anything is.

`load` does what a plan says; `sgld info` and `/server_info` show it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sgld.config import EngineConfig, Precision
from sgld.errors import ModelError
from sgld.models import cache_dit, noise
from sgld.models.attention import Attention, choose
from sgld.models.backend import ENGINE, Backend, choose_backend
from sgld.models.cache_dit import CacheDit
from sgld.models.overlay import find_model
from sgld.models.pipeline_class import class_name, with_class
from sgld.models.quantization import Quantization
from sgld.models.requirements import Capability
from sgld.models.resolve import ModelSource, model_index
from sgld.models.roles import Place, places, precisions, role
from sgld.models.sharing import NOTHING, Sharing, share
from sgld.models.single_file import single_file
from sgld.models.sources import ComponentClass, ComponentSource, class_of, find, own_code, with_variant
from sgld.models.verdicts import VerdictFile
from sgld.models.weight_files import Weights, is_file_of_weights
from sgld.models.weights_choice import choose_weights, is_denoiser, weights_paths


@dataclass(frozen=True)
class ComponentPlan:
    """One entry of the model's index.

    `precision` is that in which it is loaded, None if it has no weights; `notes` say what else was decided, one phrase
    each. `auto_class` loads it if it is code of its own.
    """

    name: str
    library: str
    class_name: str
    precision: Precision | None
    source: ComponentSource
    notes: tuple[str, ...] = ()
    is_separate: bool = False
    """It is loaded by itself, not by the loader of its pipeline."""
    has_parts: bool = False
    """Each rank loads its parts of it only."""
    auto_class: str | None = None
    weights: Weights | None = None
    """Files that its weights come from, if not from its source by its library's own loader."""
    quantization: Quantization | None = None
    place: Place = "device"
    can_be_compiled: bool = False


@dataclass(frozen=True)
class Plan:
    """A model that can be loaded. `device_type` is cpu or cuda; `notes` are about all of it, one phrase each."""

    config: EngineConfig
    source: ModelSource
    index: dict[str, Any]
    pipeline_class: str
    device_type: str
    components: tuple[ComponentPlan, ...]
    notes: tuple[str, ...] = ()
    attention: Attention | None = None
    scheduler: Any = None
    """The noise scheduler in the place of the model's own, where one was chosen."""
    backend: Backend = ENGINE
    cached: CacheDit | None = None
    sharing: Sharing = NOTHING

    def decisions(self) -> dict[str, str]:
        """What was decided, for people: by component, and of the whole under `model`."""
        phrases = {part.name: (*filter(None, [part.precision]), *part.notes) for part in self.components}
        return {name: "; ".join(said) for name, said in {**phrases, "model": self.notes}.items() if said}


def plan(config: EngineConfig, *, materializes: bool = True) -> Plan:
    """Decide what is loaded.

    :param materializes: False: a model that an overlay makes isn't made for it.
    :raises ModelError: the model can't be found or read, or what is asked for can't be had.
    """
    source = single_file(config) or find_model(config, materializes=materializes)
    index = with_class(config, source, model_index(source))
    device_type = _device_type(config)
    _check_names(config, index)
    own = entries(index)
    components = [_own(name, entry, source, config, device_type) for name, entry in own.items()]
    for name, path in config.component_paths.items():
        if is_file_of_weights(path):
            continue
        components.append(_override(name, path, own.get(name), config, device_type))
    # Of two with one name the one that was chosen is the later; the place is that of the index.
    parts = tuple({part.name: part for part in components}.values())
    scheduler, parts = noise.choose(config.noise, parts, config.model_path)
    parts = tuple(_quantized(part, source.file, config, device_type, fetches=materializes) for part in parts)
    parts, of_memory = _placed(parts, config, device_type)
    attention = choose(config.attention, device_type, _dit_precision(config, device_type))
    name = class_name(index)
    modes = VerdictFile(source, index, parts).read().modes
    backend = choose_backend(config.backend, [name], modes, cache_dit.asked_for(config.cache_dit))
    cached = cache_dit.choose(config.cache_dit, backend)
    sharing = share(parts, config, device_type, is_whole=backend.is_whole, file=source.file)
    parts = tuple(_with_parts(part, sharing) for part in parts)
    chosen = (backend.note, *(choice.note for choice in (attention, cached) if choice is not None))
    if attention is None and device_type == "cuda" and not backend.is_whole:
        chosen = (*chosen, "attention by the kernel that is found to be fastest while it is loaded")
    notes = (
        *source.notes,
        *_source_notes(source, config),
        *filter(None, chosen),
        *of_memory,
        *sharing.notes,
        *config.adapters.notes,
    )
    return Plan(config, source, index, name, device_type, parts, notes, attention, scheduler, backend, cached, sharing)


def _with_parts(part: ComponentPlan, sharing: Sharing) -> ComponentPlan:
    """As ranks that have parts of it load it."""
    divided = sharing.divided
    notes = (*part.notes, divided.said[part.name]) if part.name in divided.said else part.notes
    return replace(part, notes=notes, has_parts=part.name in divided.names)


def with_notes(decisions: dict[str, str], notes: dict[str, str]) -> dict[str, str]:
    """The decisions, and what was found out of components while they were loaded."""
    joined = {name: "; ".join(filter(None, [decisions.get(name), note])) for name, note in notes.items()}
    return decisions | joined


def entries(index: dict[str, Any]) -> dict[str, list[Any]]:
    """The components that an index names: (library, class) and, of modular pipelines, where each comes from."""
    return {
        name: value
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) in (2, 3) and isinstance(value[0], str)
    }


def _source_notes(source: ModelSource, config: EngineConfig) -> list[str]:
    """What was chosen of a model's place."""
    chosen = config.source
    notes = {
        "weights from {}": source.file,
        "configuration from {}": source.pretrained_name if source.file else None,
        "subfolder {}": chosen.model_subfolder,
        "variant {}": chosen.variant,
        "pipeline class {}": chosen.pipeline_class_name,
        "pipeline code from {}": chosen.custom_pipeline,
    }
    return [phrase.format(value) for phrase, value in notes.items() if value]


def _check_names(config: EngineConfig, index: dict[str, Any]) -> None:
    """:raises ModelError: a component is to be replaced that the model doesn't have; says which it has."""
    # Also those that it leaves out: a safety checker, an image encoder.
    names = [name for name, value in index.items() if not name.startswith("_") and isinstance(value, list)]
    loaded = [name for name in names if name in entries(index) or name in config.component_paths]
    for name, known in (*((n, names) for n in config.component_paths), *((n, loaded) for n in weights_paths(config))):
        if name not in known:
            raise ModelError(f"{config.model_path} has no component {name!r}; it has {', '.join(known)}")


def _own(name: str, entry: list[Any], model: ModelSource, config: EngineConfig, device_type: str) -> ComponentPlan:
    """A component that nobody chose another for: with its model, or where a modular pipeline's index says."""
    variant = config.source.variant
    source = with_variant(ComponentSource(model.pretrained_name, model.inside(name), model.revision), variant)
    is_here = model.folder is not None and (model.folder / name).is_dir()
    if len(entry) == 3 and not is_here:
        said = {key: entry[2].get(key) for key in ("subfolder", "revision", "variant")}
        source = ComponentSource(str(entry[2].get("pretrained_model_name_or_path")), **said)
    if is_here and (found := own_code(source)) is not None:
        return _separate(name, found, source, config, device_type)
    return _component(name, _class(entry), source, config, device_type)


def _class(entry: list[Any]) -> ComponentClass:
    return ComponentClass(str(entry[0]), str(entry[1]))


def _override(name: str, path: str, entry: list[Any] | None, config: EngineConfig, device_type: str) -> ComponentPlan:
    """A component from a place that was chosen, of the class that its own files name."""
    named = None if entry is None else _class(entry)
    source = with_variant(find(name, path, named), config.source.variant)
    return _separate(name, class_of(name, source, named), source, config, device_type)


def _separate(
    name: str, cls: ComponentClass, source: ComponentSource, config: EngineConfig, device_type: str
) -> ComponentPlan:
    """A component that is loaded by itself."""
    if cls.auto_class is not None and not config.trust_remote_code:
        raise ModelError(f"{name} from {source} is code of its own ({cls.name}); allow it with --trust-remote-code")
    if cls.module and source.folder is not None and not (source.folder / f"{cls.module}.py").is_file():
        raise ModelError(f"{name} from {source} has no {cls.module}.py, where its class {cls.name} should be")
    part = _component(name, cls, source, config, device_type)
    return replace(part, notes=(f"{cls.name} from {source}",), is_separate=True)


def _component(
    name: str, cls: ComponentClass, source: ComponentSource, config: EngineConfig, device_type: str
) -> ComponentPlan:
    has_weights = role(name, cls.library, cls.name) != "none"
    precision = _dit_precision(config, device_type) if has_weights else None
    return ComponentPlan(name, cls.library, cls.name, precision, source, auto_class=cls.auto_class)


def _placed(
    parts: tuple[ComponentPlan, ...], config: EngineConfig, device_type: str
) -> tuple[tuple[ComponentPlan, ...], tuple[str, ...]]:
    """The components with their precisions and places, and what there is to say of the model."""
    roles = {part.name: role(part.name, part.library, part.class_name) for part in parts}
    precision_of = precisions(roles, config, _dit_precision(config, device_type))
    place_of, notes, of_model = places(roles, config, device_type)
    placed = []
    for part in parts:
        place = place_of.get(part.name, "device")
        if place != "device" and part.quantization is not None and part.quantization.family == "bitsandbytes":
            raise ModelError(f"{part.name} is quantized by bitsandbytes, whose weights can't be offloaded")
        can_be_compiled = roles[part.name] == "dit" and place != "layerwise"
        said = [notes[part.name]] if part.name in notes else []
        if config.enable_torch_compile and place == "layerwise":
            said.append("not compiled, as its layers come and go")
        told = (*part.notes, *said)
        precision = precision_of.get(part.name)
        placed.append(replace(part, precision=precision, notes=told, place=place, can_be_compiled=can_be_compiled))
    return tuple(placed), of_model


def _quantized(
    part: ComponentPlan, file: Path | None, config: EngineConfig, device_type: str, *, fetches: bool
) -> ComponentPlan:
    """With its weights and how they are quantized, if they come by themselves or are quantized."""
    path = weights_paths(config).get(part.name)
    if path is None and not is_denoiser(part.library, part.class_name):
        return part
    whole = None if part.is_separate else file
    place, options, gpu = (part.name, part.source, path, whole), config.quantized, _capability(device_type)
    chosen = choose_weights(*place, options, gpu, fetches=fetches)
    return replace(
        part,
        weights=chosen.weights,
        quantization=chosen.quantization,
        notes=(*part.notes, *chosen.notes),
        is_separate=part.is_separate or chosen.weights is not None,
    )


def _dit_precision(config: EngineConfig, device_type: str) -> Precision:
    return config.dit_precision or ("fp32" if device_type == "cpu" else "bf16")


def _capability(device_type: str) -> Capability | None:
    import torch

    return torch.cuda.get_device_capability(0) if device_type == "cuda" else None


def _device_type(config: EngineConfig) -> str:
    import torch  # takes seconds: not for who only imports this module

    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ModelError("device is 'cuda', but torch finds no GPU here; use --device cpu or auto")
    return "cuda" if has_cuda and config.device != "cpu" else "cpu"
