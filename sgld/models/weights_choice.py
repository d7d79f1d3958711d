"""Which weights a component gets and how these are quantized: decided for a plan."""

import re
from dataclasses import dataclass
from pathlib import Path

from sgld.config import EngineConfig, QuantizationConfig
from sgld.errors import ModelError
from sgld.models.quantization import BY_FILES, Quantization, agreed, detect
from sgld.models.requirements import Capability, check
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
    whole: Path | None,
    config: QuantizationConfig,
    capability: Capability | None,
    *,
    fetches: bool,
) -> Chosen:
    """The weights of a component.

    :param path: where they are if not with the component.
    :param whole: the file that the whole model is, if it is one.
    :param capability: of the GPU; None on a CPU.
    :param fetches: False: weights on the hub aren't fetched for it.
    :raises ModelError: they aren't there, can't be read, contradict the config, or need what isn't here.
    """
    place = place_of(path) if path is not None else None
    if place is not None and place.folder is None and not fetches:
        return Chosen(None, None, (f"weights of {place.name}, which are looked at when they are loaded",))
    if place is not None:
        weights: Weights | None = weights_at(place)
    else:
        weights = Weights(str(whole), (whole,)) if whole is not None else _own_weights(source)
    is_with_source = place is None and whole is None
    declared = config_of(source) if is_with_source else weights.config if weights is not None else None
    found = detect(weights, declared)
    if weights is None and found is not None and found.family in BY_FILES and fetches:
        # On the hub only the config was read.
        weights = weights_at(Place(str(source), None, source.subfolder or "", source.path, source.revision))
        found = detect(weights, declared)
    found = agreed(config.quantization, found, name)
    if found is not None:
        found = check(found, name, capability)
    is_by_files = found is not None and found.family in BY_FILES and not found.is_online
    if whole is not None and place is None and found is not None and not is_by_files and not found.is_online:
        raise ModelError(f"{whole} is quantized with {found.family}; name it in --transformer-weights-path instead")
    notes = (*((f"weights of {place.name}",) if place is not None else ()), *(found.notes if found is not None else ()))
    return Chosen(weights if place is not None or is_by_files else None, found, notes)


def _own_weights(source: ComponentSource) -> Weights | None:
    """The files beside a component's config; None where there are none, or several that its own loader chooses from."""
    folder = source.folder
    if folder is None or source.variant is not None:
        return None
    try:
        return weights_at(Place(str(source), folder))
    except ModelError:
        return None
