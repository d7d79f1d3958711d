"""What is loaded, from where and in what form: decided from the config and the model's files, before anything is.

`load` does what a plan says; `sgld info` and `/server_info` show it.
"""

import re
from dataclasses import dataclass
from typing import Any

from sgld.config import EngineConfig, Precision
from sgld.errors import ModelError
from sgld.models.attention import Attention, choose
from sgld.models.resolve import ModelSource, model_index, resolve

# Classes of components that have no weights.
_WEIGHTLESS = re.compile(r"Tokenizer|Scheduler|Processor|Extractor|Guidance|Guider")


@dataclass(frozen=True)
class ComponentPlan:
    """One entry of the model's index.

    `precision` is that in which it is loaded, None if it has no weights; `notes` say what else was decided, one phrase
    each.
    """

    name: str
    library: str
    class_name: str
    precision: Precision | None
    notes: tuple[str, ...] = ()


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

    def decisions(self) -> dict[str, str]:
        """What was decided, for people: by component, and of the whole under `model`."""
        phrases = {part.name: (*filter(None, [part.precision]), *part.notes) for part in self.components}
        return {name: "; ".join(said) for name, said in {**phrases, "model": self.notes}.items() if said}


def plan(config: EngineConfig) -> Plan:
    """Decide what is loaded.

    :raises ModelError: the model can't be found or read, or what is asked for can't be had.
    """
    source = resolve(config.model_path)
    index = model_index(source, config.revision)
    device_type = _device_type(config)
    components = tuple(
        _component(name, str(v[0]), str(v[1]), config, device_type) for name, v in entries(index).items()
    )
    attention = choose(config.attention, device_type, _dit_precision(config, device_type))
    notes = (attention.note,) if attention is not None else ()
    return Plan(config, source, index, _pipeline_class(config, index), device_type, components, notes, attention)


def with_notes(decisions: dict[str, str], notes: dict[str, str]) -> dict[str, str]:
    """The decisions, and what was found out of components while they were loaded."""
    joined = {name: "; ".join(filter(None, [decisions.get(name), note])) for name, note in notes.items()}
    return decisions | joined


def entries(index: dict[str, Any]) -> dict[str, list[Any]]:
    """The components that an index names: (library, class) and, of modular pipelines, where each comes from."""
    return {
        name: value
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) in (2, 3) and value[0] is not None
    }


def _pipeline_class(config: EngineConfig, index: dict[str, Any]) -> str:
    named = index.get("_class_name")
    if not named:
        raise ModelError(f"model_index.json of {config.model_path} names no pipeline class (_class_name)")
    # A model with code of its own names the file, too.
    return str(named[-1] if isinstance(named, list) else named)


def _component(name: str, library: str, class_name: str, config: EngineConfig, device_type: str) -> ComponentPlan:
    if _WEIGHTLESS.search(class_name):
        return ComponentPlan(name, library, class_name, None)
    precision = _dit_precision(config, device_type)
    if name == "vae" and config.vae_precision:
        precision = config.vae_precision
    return ComponentPlan(name, library, class_name, precision)


def _dit_precision(config: EngineConfig, device_type: str) -> Precision:
    return config.dit_precision or ("fp32" if device_type == "cpu" else "bf16")


def _device_type(config: EngineConfig) -> str:
    import torch  # takes seconds: not for who only imports this module

    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ModelError("device is 'cuda', but torch finds no GPU here; use --device cpu or auto")
    return "cuda" if has_cuda and config.device != "cpu" else "cpu"
