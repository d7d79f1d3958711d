"""Files that settings come from: configuration, prompts, and the metadata of a picture."""

from pathlib import Path

import msgspec

from sgld_cli.options import UsageError


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

    :raises InvalidRequest: it can't be read, or holds none.
    """
    from sgld.media.metadata import read_metadata  # loads Pillow, which --help doesn't need

    metadata = read_metadata(path)
    params = metadata.pop("params", None)
    if not isinstance(params, dict):
        raise UsageError(f"{path} holds no parameters of sgld, so it can't be repeated")
    metadata.pop("version", None)
    return {**metadata, **params}


def read_text(path: Path) -> str:
    """The text of a file.

    :raises UsageError: it can't be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8 text"
        raise UsageError(f"{path} can't be read: {reason}") from None


def _parse_json(text: str, path: Path) -> object:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise UsageError(f"{path} isn't JSON: {error}") from None


def _parse_yaml(text: str, path: Path) -> object:
    import yaml  # only here: it takes as long to load as all the rest

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} isn't YAML: {' '.join(str(error).split())}") from None
