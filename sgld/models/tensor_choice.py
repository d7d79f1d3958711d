"""Which components of a model ranks have parts of, decided before anything is loaded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sgld.errors import ModelError
from sgld.models.roles import Role
from sgld.models.sources import ComponentSource
from sgld.outcome import one_line
from sgld.parallel import ParallelConfig


class Part(Protocol):
    """What is asked of the plan of a component."""

    @property
    def name(self) -> str: ...
    @property
    def library(self) -> str: ...
    @property
    def class_name(self) -> str: ...
    @property
    def source(self) -> ComponentSource: ...
    @property
    def auto_class(self) -> str | None: ...
    @property
    def weights(self) -> Any: ...
    @property
    def quantization(self) -> Any: ...


@dataclass(frozen=True)
class Divided:
    """Components of which each rank has parts, and what is said of these and of those that stay whole."""

    names: tuple[str, ...] = ()
    said: Mapping[str, str] = field(default_factory=dict)


def choose(parts: Iterable[tuple[Part, Role]], file: Path | None, parallel: ParallelConfig) -> Divided:
    """Text encoders and denoisers are divided where somebody says how; the others are whole.

    :param file: all weights of the model are in it.
    :raises ModelError: something doesn't work with that, or nothing would be divided.
    """
    size = parallel.tp_size
    if size == 1:
        return Divided()
    if file is not None:
        raise ModelError(
            f"tp_size is {size}, but the weights are in one file ({file}), of which ranks can't read parts"
        )
    reasons = {part.name: _problem(part, size) for part, does in parts if does in ("text_encoder", "dit")}
    names = tuple(name for name, reason in reasons.items() if reason is None)
    if not names:
        problem = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "it has no such component"
        raise ModelError(f"tp_size is {size}, but nothing of this model can be divided ({problem}); leave it at 1")
    said = dict.fromkeys(names, f"each of {size} ranks has parts of its layers")
    return Divided(names, said | {name: f"whole: {why}" for name, why in reasons.items() if why is not None})


def _problem(part: Part, size: int) -> str | None:
    """Why a component stays whole; None: it doesn't.

    :raises ModelError: it should be divided, and can't be like this.
    """
    from sgld.models.blueprints import model_class
    from sgld.models.tensor import Indivisible, NoPlan
    from sgld.models.tensor_files import divided, weight_files
    from sgld.models.tensor_layers import Team

    cls = model_class(part.library, part.class_name) if part.auto_class is None else None
    if cls is None:
        return f"{part.class_name} isn't a model of transformers or diffusers"
    called = f"{part.name} ({part.class_name})"
    try:
        model, _ = divided(cls, part.source, Team(0, size))
    except NoPlan as reason:
        return str(reason)
    except Indivisible as reason:
        raise ModelError(f"{called} can't be divided by tp_size {size}: {reason}") from None
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"the configuration of {called} can't be read: {one_line(error)}") from None
    config: Any = model.config
    if part.quantization is not None or getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{called} is quantized, and ranks can't have parts of quantized layers; leave tp_size at 1")
    if part.weights is not None:
        raise ModelError(f"{called} has weights of its own, of which ranks can't read parts; leave tp_size at 1")
    if part.source.folder is not None:
        weight_files(cls, part.source)
    return None
