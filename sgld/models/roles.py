"""What a component does in its pipeline, and what of the options follows for it: its precision and its place."""

import re
from collections.abc import Mapping
from typing import Literal

from sgld.config import EngineConfig, Precision
from sgld.errors import ModelError

Role = Literal["text_encoder", "image_encoder", "dit", "vae", "none"]
"""`none` has no weights."""
Place = Literal["device", "offload", "layerwise"]
"""On the device; on the host, and on the device only while it is needed; or so layer by layer."""

# Names of components come before their classes: pipelines choose them, and most use these. The first that fits counts.
_BY_NAME: tuple[tuple[str, Role], ...] = (
    (r"(.*_)?(vae|vqvae|vqgan|movq|vocoder)(_.*)?", "vae"),
    (r"(.*_)?(image_encoder|vision_encoder|vision_model|safety_checker)(_.*)?", "image_encoder"),
    (r"(.*_)?text_encoder(_.*)?", "text_encoder"),
)
_BY_CLASS: tuple[tuple[str, Role], ...] = (
    (r"Tokenizer|Scheduler|Processor|Extractor|Guidance|Guider", "none"),
    (r"Autoencoder|VQModel|Vocoder", "vae"),
    (r"Vision(Model|Encoder|Transformer)|ImageEncoder|SafetyChecker", "image_encoder"),
)
_OFFLOADS: tuple[tuple[str, Role, Place], ...] = (
    ("text_encoder_cpu_offload", "text_encoder", "offload"),
    ("image_encoder_cpu_offload", "image_encoder", "offload"),
    ("dit_cpu_offload", "dit", "offload"),
    ("vae_cpu_offload", "vae", "offload"),
    ("dit_layerwise_offload", "dit", "layerwise"),
)
_NAMES: dict[Role, str] = {
    "text_encoder": "text encoder",
    "image_encoder": "image encoder",
    "dit": "denoiser",
    "vae": "VAE",
}
_AT_HOME = "already on the CPU, where it computes: there is nothing to offload"
_SAID = {"offload": "on the CPU between its calls", "layerwise": "on the CPU, layers come to the GPU one by one"}


def role(name: str, library: str, class_name: str) -> Role:
    """What an entry of a model's index does. A model of transformers reads text, any other one denoises."""
    if re.search(_BY_CLASS[0][0], class_name):
        return "none"
    named = next((found for pattern, found in _BY_NAME if re.fullmatch(pattern, name)), None)
    by_class = next((found for pattern, found in _BY_CLASS if re.search(pattern, class_name)), None)
    return named or by_class or ("text_encoder" if library == "transformers" else "dit")


def precisions(roles: Mapping[str, Role], config: EngineConfig, default: Precision) -> dict[str, Precision]:
    """The precision of each component that has weights.

    :param default: that of denoisers, and of all that has none of its own.
    :raises ModelError: there are as many precisions of text encoders as the model doesn't have.
    """
    encoders = [name for name, does in roles.items() if does == "text_encoder"]
    given = config.memory.text_encoder_precision
    if len(given) not in (0, 1, len(encoders)):
        raise ModelError(
            f"text_encoder_precision has {len(given)} values, but {config.model_path} has {len(encoders)} text"
            f" encoders ({', '.join(encoders) or 'none'}); give one for all, or one for each in this order"
        )
    of_encoders = dict(zip(encoders, given * len(encoders) if len(given) == 1 else given, strict=False))
    of_roles = {"vae": config.vae_precision, "image_encoder": given[0] if given else None}
    return {
        name: of_encoders.get(name) or of_roles.get(does) or default for name, does in roles.items() if does != "none"
    }


def places(
    roles: Mapping[str, Role], config: EngineConfig, device_type: str
) -> tuple[dict[str, Place], dict[str, str], tuple[str, ...]]:
    """The place of each component that isn't the device, a note for each, and notes of the model."""
    chosen: dict[str, Place] = {}
    notes: dict[str, str] = {}
    of_model: list[str] = []
    for option, of_role, place in _OFFLOADS:
        if not config.memory.offloads(option):
            continue
        names = [name for name, does in roles.items() if does == of_role]
        if not names and not getattr(config.memory, option):
            continue
        if not names:
            of_model.append(f"{option} does nothing: the model has no {_NAMES[of_role]}")
        elif device_type == "cpu":
            notes |= dict.fromkeys(names, _AT_HOME)
        else:
            chosen |= dict.fromkeys(names, place)
            notes |= dict.fromkeys(names, _SAID[place])
    return chosen, notes, tuple(of_model)
