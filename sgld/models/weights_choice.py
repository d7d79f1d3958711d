"""Which weights a component gets and how these are quantized: decided for a plan."""

import re
from dataclasses import dataclass

from sgld.config import EngineConfig, QuantizationConfig
from sgld.errors import ModelError
from sgld.models.quantization import OWN, Capability, Quantization, agreed, check, detect
from sgld.models.sources import ComponentSource, config_of
from sgld.models.weight_files import Place, Weights, is_file_of_weights, place_of, weights_at

# Classes of what predicts noise, whose layers are most of a model.
_DENOISER = re.compile(r"Transformer|UNet|DiT")
_NO_DENOISER = re.compile(r"ControlNet|Adapter|Autoencoder")


@dataclass(frozen=True)
class Chosen:
    """Weights that sgld loads itself, None where the component's own loader does; what they are; phrases for people."""

    weights: Weights | None
    quantization: Quantization | None
    notes: tuple[str, ...]


def is_denoiser(library: str, class_name: str) -> bool:
    """Whether a class is one whose layers may be quantized."""
    is_named = _DENOISER.search(class_name) and not _NO_DENOISER.search(class_name)
    return library != "transformers" and bool(is_named)


def weights_paths(config: EngineConfig) -> dict[str, str]:
    """Component to where its weights come from, also where they were given as a component's path."""
    quantized = config.quantized
    named = {
        "transformer": quantized.transformer_weights_path,
        "transformer_2": quantized.transformer_2_weights_path,
        "unet": quantized.unet_weights_path,
    }
    files = {name: path for name, path in config.component_paths.items() if is_file_of_weights(path)}
    return files | {name: path for name, path in named.items() if path is not None}


def choose_weights(
    name: str,
    source: ComponentSource,
    path: str | None,
    config: QuantizationConfig,
    capability: Capability | None,
    *,
    fetches: bool,
) -> Chosen:
    """The weights of a component.

    :param path: where they are if not with the component.
    :param capability: of the GPU; None on a CPU.
    :param fetches: False: what is on the hub isn't looked at.
    :raises ModelError: they aren't there, can't be read, contradict the config, or need what isn't here.
    """
    place = place_of(path) if path is not None else None
    weights = weights_at(place) if place is not None and (fetches or place.folder is not None) else None
    if place is not None and weights is None:
        return Chosen(None, None, (f"weights of {place.name}, which are looked at when they are loaded",))
    if place is None:
        weights = _own_weights(source)
    declared = weights.config if place is not None and weights is not None else config_of(source)
    found = agreed(config.quantization, detect(weights, declared), name)
    if found is not None:
        found = check(found, name, capability)
    notes = (*((f"weights of {place.name}",) if place is not None else ()), *(found.notes if found is not None else ()))
    is_own = found is not None and found.family in OWN and not found.is_online
    if place is None and is_own and weights is None:
        weights = weights_at(Place(str(source), None, source.subfolder or "", source.path, source.revision))
    return Chosen(weights if place is not None or is_own else None, found, notes)


def _own_weights(source: ComponentSource) -> Weights | None:
    """The files beside a component's config; None where there are none, or several that its own loader chooses from."""
    folder = source.folder
    if folder is None or source.variant is not None:
        return None
    try:
        return weights_at(Place(str(source), folder))
    except ModelError:
        return None
