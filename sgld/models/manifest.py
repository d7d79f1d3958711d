"""The manifest of an overlay: which files of a source model go where. The structs are its schema."""

from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from sgld.errors import ModelError

MANIFEST_FILE = "_overlay/overlay_manifest.json"


class _Mapping(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Files of the source; all paths are relative to their folders, and stay inside of them."""

    src: str

    def __post_init__(self) -> None:
        for path in (getattr(self, name) for name in self.__struct_fields__):
            _check_relative(path)


class FileMapping(_Mapping, frozen=True, kw_only=True, tag="file"):
    """One file. `dst` is what it is called in the model, by default the last part of `src`."""

    dst: str | None = None


class TreeMapping(_Mapping, frozen=True, kw_only=True, tag="tree"):
    """All files below a folder. `dst_dir` is what the folder is called in the model, by default `src`."""

    dst_dir: str | None = None


class GlobMapping(_Mapping, frozen=True, kw_only=True, tag="glob"):
    """The files that a pattern matches (`**` for any folders); they keep their paths."""


AnyMapping = FileMapping | TreeMapping | GlobMapping


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model in the layout of diffusers is made of a source model and an overlay."""

    source_model_id: str | None = None
    """Only an overlay that is in the registry can do without."""
    source_revision: str | None = None
    source_allow_patterns: tuple[str, ...] | None = None
    """What is fetched of a source on the hub; None: everything."""
    required_source_files: tuple[str, ...] = ()
    materializer_version: str = "v1"
    """Another one makes the model anew."""
    file_mappings: tuple[AnyMapping, ...] = ()
    custom_materializer: str | None = None
    """A Python file of the overlay with `materialize(overlay_dir=, source_dir=, output_dir=, manifest=)`."""

    def __post_init__(self) -> None:
        for path in (*self.required_source_files, self.custom_materializer):
            _check_relative(path)


def read_manifest(folder: Path, name: str) -> tuple[Manifest, dict[str, Any]] | None:
    """The manifest of the overlay in a folder, and as it is written; None if it has none.

    :param name: of the overlay, for messages.
    :raises ModelError: it can't be read, or isn't a manifest.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        content = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        return msgspec.convert(_with_types(content), Manifest), content
    except (OSError, ValueError) as error:
        raise ModelError(f"{MANIFEST_FILE} of overlay {name} can't be used: {error}".replace("`", "")) from None


def _with_types(content: dict[str, Any]) -> dict[str, Any]:
    """A mapping without a type is one of a file; msgspec has no default for the tag of a union."""
    mappings = content.get("file_mappings")
    if not isinstance(mappings, list):
        return content
    typed = [{"type": "file", **mapping} if isinstance(mapping, dict) else mapping for mapping in mappings]
    return {**content, "file_mappings": typed}


def _check_relative(path: str | None) -> None:
    """:raises ValueError: it isn't a path that stays in the folder that it starts in."""
    if path is None:
        return
    parts = PurePosixPath(path).parts
    if not path or "\0" in path or path.startswith("/") or ".." in parts:
        raise ValueError(f"{path!r} leads out of its folder; paths are relative, without '..'")
