"""Files that settings come from: configuration, prompts, and the metadata of a picture."""

from pathlib import Path

import msgspec

from sgld.sampling_params import SamplingParams
from sgld_cli.options import UsageError, options_by_name

ENGINE_METADATA = (
    *("revision", "component_paths", "model_subfolder", "variant", "single_file_config", "pipeline_class_name"),
    *("custom_pipeline", "dit_precision", "vae_precision", "text_encoder_precision", "vae_tiling", "vae_slicing"),
    *("scheduler", "scheduler_config", "boundary_ratio", "embedded_cfg_scale", "transformer_weights_path"),
    *("transformer_2_weights_path", "unet_weights_path", "quantization", "quantization_ignored_layers"),
    *("backend", "cache_dit_config", "lora_partial"),
)
"""Settings of the engine that change the pixels, hence belong to what repeats a picture."""

_TOO_DEEP = "it is nested too deeply"


def repeatable() -> frozenset[str]:
    """The sampling params that make an output what it is."""
    fields = frozenset(SamplingParams.__struct_fields__)
    return fields & {name for name, option in options_by_name().items() if not option.is_scheduling}


def read_config(path: Path) -> dict[str, object]:
    """The keys of a JSON or YAML file.

    :raises UsageError: it can't be read, or holds something else.
    """
    text = read_text(path)
    match path.suffix.lower():
        case ".json":
            content = _parse_json(text, path)
        case ".yaml" | ".yml":
            content = _parse_yaml(text, path)
        case other:
            raise UsageError(f"{path} ends in {other!r}: a config file is .json, .yaml or .yml")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"{path} doesn't hold keys and values, as `seed: 42`")
    return content


def read_picture(path: Path) -> dict[str, object]:
    """The settings that a picture or video was made with, from its metadata.

    Only what sgld writes there is taken: a picture from somebody else must not decide where files go.

    :raises UsageError: it holds no settings.
    :raises InvalidRequest: it can't be read, or holds none.
    """
    from sgld.media.metadata import read_metadata  # loads Pillow, which --help doesn't need

    try:
        metadata = read_metadata(path)
    except RecursionError:
        raise UsageError(f"the metadata of {path} can't be read: {_TOO_DEEP}") from None
    params = metadata.get("params")
    if not isinstance(params, dict):
        raise UsageError(f"{path} holds no parameters of sgld, so it can't be repeated")
    sampling = repeatable()
    return {
        **{name: value for name, value in metadata.items() if name in ("model_path", *ENGINE_METADATA)},
        **{name: value for name, value in params.items() if name in sampling},
    }


def read_text(path: Path) -> str:
    """The text of a file.

    :raises UsageError: it can't be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path} can't be read: it isn't UTF-8 text") from None
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} can't be read: {reason}") from None


def _parse_json(text: str, path: Path) -> object:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise UsageError(f"{path} isn't JSON: {error}") from None
    except RecursionError:
        raise UsageError(f"{path} can't be read: {_TOO_DEEP}") from None


def _parse_yaml(text: str, path: Path) -> object:
    import yaml  # only here: it takes as long to load as all the rest

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} isn't YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UsageError(f"{path} can't be read: {_TOO_DEEP}") from None
    except (ValueError, LookupError, AttributeError) as error:
        # PyYAML lets them through for values that only look right: 2024-99-99, `!!bool maybe`, `!!timestamp x`.
        raise UsageError(f"{path} holds a value that can't be read: {error}") from None
