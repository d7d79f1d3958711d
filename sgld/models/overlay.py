"""Overlays: small repos that make models in the layout of diffusers of those that aren't.

An overlay belongs to a model by the registry (a file that ships, and the user's own), or names its source itself.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sgld.config import EngineConfig
from sgld.errors import ModelError
from sgld.models.hub import fetch, has_file
from sgld.models.manifest import MANIFEST_FILE, read_manifest
from sgld.models.mapping import NOT_OF_OVERLAYS
from sgld.models.materialize import Overlay, inputs_of, local_folder, materialize, whole
from sgld.models.resolve import EMBEDDED, INDEX_FILE, ModelSource, is_hub_id, resolve
from sgld.outcome import one_line

VARIABLE = "SGLANG_DIFFUSION_MODEL_OVERLAY_REGISTRY"
BUILT_IN = Path(__file__).with_name("overlay_registry.json")


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One value of the registry: the overlay of a model; the repo of an overlay may be a folder."""

    overlay_repo_id: Annotated[str, Meta(min_length=1)]
    overlay_revision: str | None = None
    source_revision: str | None = None


def find_model(config: EngineConfig, *, materializes: bool = True) -> ModelSource:
    """Find the model of a config; what an overlay makes of it, if one belongs to it.

    :param materializes: False: a model that isn't made yet stays so, and its source is the overlay's folder.
    :raises ModelError: it can't be found, or not be made.
    """
    overlay = _found(config)
    if overlay is None:
        return replace(resolve(config.model_path, config.source.model_subfolder), revision=config.revision)
    if isinstance(overlay, ModelSource):
        return overlay
    if config.source.model_subfolder is not None:
        raise ModelError(
            f"model_subfolder isn't for models with an overlay ({overlay.name}), whose mappings say it all"
        )
    inputs = inputs_of(overlay)
    parts = _at(overlay.name, overlay.revision), _at(overlay.source, overlay.source_revision)
    made_from = f"materialised from overlay {parts[0]} and source {parts[1]}"
    if materializes:
        folder = materialize(overlay, inputs, trust_remote_code=config.trust_remote_code)
    else:
        folder = whole(inputs) or overlay.folder
        made_from = made_from if folder != overlay.folder else f"will be {made_from} when it is loaded"
    return ModelSource(config.model_path, folder, notes=(made_from,))


def registry() -> dict[str, Entry]:
    """The overlays of models: those that ship, then those of the environment.

    :raises ModelError: an entry isn't one, or the user's registry can't be read.
    """
    return _entries(BUILT_IN.read_text(), BUILT_IN.name) | _of_environment(
        os.environ.get("SGLANG_DIFFUSION_MODEL_OVERLAY_REGISTRY", "").strip()
    )


def _of_environment(value: str) -> dict[str, Entry]:
    if not value or value.startswith("{"):
        return _entries(value or "{}", VARIABLE)
    try:
        return _entries(Path(value).expanduser().read_text(), f"{value} ({VARIABLE})")
    except (OSError, RuntimeError, UnicodeError) as error:
        raise ModelError(
            f"{VARIABLE} is {value!r}: neither a JSON object nor a file that can be read: {one_line(error)}"
        ) from None


def _entries(text: str, where: str) -> dict[str, Entry]:
    try:
        raw = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ModelError(f"{where} isn't a JSON object of models and their overlays: {error}") from None
    return {key: _entry(key, value, where) for key, value in raw.items()}


def _entry(key: str, value: object, where: str) -> Entry:
    try:
        return msgspec.convert({"overlay_repo_id": value} if isinstance(value, str) else value, Entry)
    except msgspec.ValidationError as error:
        problem = str(error).replace("`", "")
        raise ModelError(
            f"{where}: the overlay of {key!r} is {value!r}: {problem}; give the id or folder of an overlay, or an "
            "object with overlay_repo_id, and overlay_revision and source_revision if need be"
        ) from None


def matching(model_path: str, entries: Mapping[str, Entry]) -> Entry | None:
    """The entry of a model: by its name; of a folder also by the name's last part, or as the hub's cache spells it."""
    if model_path in entries:
        return entries[model_path]
    folder = local_folder(model_path)
    if folder is None or model_path in EMBEDDED:
        return None
    parts = [part.lower() for part in folder.absolute().parts]
    for key, entry in entries.items():
        if folder.name == key.rpartition("/")[2] or f"models--{key.replace('/', '--')}".lower() in parts:
            return entry
    return None


def _found(config: EngineConfig) -> Overlay | ModelSource | None:
    """The overlay of a model; where that is a complete repo itself, the model that it is; None: it has no overlay."""
    model_path = config.model_path
    entries = registry()
    folder = local_folder(model_path)
    if model_path not in entries and folder is not None and (folder / MANIFEST_FILE).is_file():
        return _direct(config, folder)
    entry = matching(model_path, entries)
    if entry is not None:
        return _registered(config, entry)
    if resolve(model_path, config.source.model_subfolder).folder is None and _is_overlay(model_path, config.revision):
        return _direct(config, fetch(model_path, config.revision, ignore=NOT_OF_OVERLAYS))
    return None


def _is_overlay(repo_id: str, revision: str | None) -> bool:
    """Whether a repo of the hub is one that makes a model; no, if the hub doesn't say: its index tells why."""
    with suppress(ModelError):
        return has_file(repo_id, MANIFEST_FILE, revision)
    return False


def _registered(config: EngineConfig, entry: Entry) -> Overlay | ModelSource:
    name, revision = entry.overlay_repo_id, entry.overlay_revision
    folder = local_folder(name)
    if folder is None and has_file(name, MANIFEST_FILE, revision):
        folder = fetch(name, revision, ignore=NOT_OF_OVERLAYS)
    found = read_manifest(folder, name) if folder is not None else None
    if folder is None or found is None:
        return _complete(config, name, revision)
    manifest, written = found
    _check_index(folder, name)
    source_revision = config.revision or entry.source_revision or manifest.source_revision
    source_folder = local_folder(config.model_path)
    return Overlay(config.model_path, source_folder, source_revision, name, revision, folder, manifest, written)


def _complete(config: EngineConfig, name: str, revision: str | None) -> ModelSource:
    """The model that an overlay without a manifest is."""
    try:
        source = resolve(name, config.source.model_subfolder)
    except ModelError as error:
        raise ModelError(
            f"overlay {name} of {config.model_path} has no {MANIFEST_FILE} to make a model, and is none: {error}"
        ) from None
    note = f"{config.model_path} is replaced by {_at(name, revision)}, its overlay, which is complete"
    return replace(source, revision=revision, notes=(note,))


def _direct(config: EngineConfig, folder: Path) -> Overlay | None:
    """The overlay that is itself given as the model."""
    name = config.model_path
    found = read_manifest(folder, name)
    if found is None:
        return None
    manifest, written = found
    if not manifest.source_model_id:
        raise ModelError(
            f"{MANIFEST_FILE} of overlay {name} has no source_model_id; without it the overlay is only good for a "
            f"model that the registry gives it ({VARIABLE})"
        )
    _check_index(folder, name)
    source = manifest.source_model_id
    if local_folder(name) is not None:
        source_folder, revision = local_folder(source), None
    elif is_hub_id(source):
        # Who wrote the overlay doesn't choose folders of this machine.
        source_folder, revision = EMBEDDED.get(source), config.revision
    else:
        raise ModelError(f"overlay {name} is made of {source!r}, which isn't an id on the hub (owner/name) as its own")
    return Overlay(source, source_folder, manifest.source_revision, name, revision, folder, manifest, written)


def _check_index(folder: Path, name: str) -> None:
    try:
        index = msgspec.json.decode((folder / INDEX_FILE).read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(f"{INDEX_FILE} of overlay {name} can't be read: {one_line(error)}") from None
    missing = [key for key in ("_class_name", "_diffusers_version") if key not in index]
    if missing:
        raise ModelError(f"{INDEX_FILE} of overlay {name} has no {' and no '.join(missing)}")


def _at(name: str, revision: str | None) -> str:
    return f"{name} at {revision}" if revision else name
