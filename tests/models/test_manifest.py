import json
from pathlib import Path
from typing import Any

import pytest

from models.overlays import overlay_in, write
from sgld.errors import ModelError
from sgld.models.manifest import MANIFEST_FILE, FileMapping, GlobMapping, Manifest, TreeMapping, read_manifest
from sgld.models.overlay import Entry


def problem(tmp_path: Path, content: Any) -> str:
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    folder = write(tmp_path, {MANIFEST_FILE: text})
    with pytest.raises(ModelError) as caught:
        read_manifest(folder, "org/overlay")
    assert str(caught.value).startswith(f"{MANIFEST_FILE} of overlay org/overlay can't be used: ")
    assert "\n" not in str(caught.value)
    return str(caught.value).partition("can't be used: ")[2]


def test_docs_have_every_field() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "overlays.md").read_text()
    fields = [*Manifest.__struct_fields__, *FileMapping.__struct_fields__, *TreeMapping.__struct_fields__]
    assert [name for name in (*fields, *Entry.__struct_fields__) if f"`{name}`" not in docs] == []


def test_mappings_have_types_and_defaults(tmp_path: Path) -> None:
    mappings = [{"src": "a"}, {"type": "file", "src": "a", "dst": "b"}, {"type": "tree", "src": "c"}]
    folder = overlay_in(tmp_path, None, file_mappings=[*mappings, {"type": "glob", "src": "**/*.json"}])
    found = read_manifest(folder, "overlay")
    assert found is not None
    manifest, written = found
    assert manifest.file_mappings == (
        FileMapping(src="a"),
        FileMapping(src="a", dst="b"),
        TreeMapping(src="c"),
        GlobMapping(src="**/*.json"),
    )
    assert (manifest.materializer_version, manifest.source_model_id) == ("v1", None)
    assert written["file_mappings"][0] == {"src": "a"}


def test_folder_without_a_manifest_has_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path, "overlay") is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "Input data was truncated"),
        (b"\xff", "invalid"),
        ([1], "Expected object, got array"),
        ({"source_model": "a/b"}, "Object contains unknown field source_model"),
        ({"file_mappings": [{"dst": "a"}]}, "Object missing required field src - at $.file_mappings[0]"),
        ({"file_mappings": [{"src": "a", "dts": "b"}]}, "unknown field dts - at $.file_mappings[0]"),
        ({"file_mappings": [{"type": "link", "src": "a"}]}, "Invalid value 'link' - at $.file_mappings[0].type"),
        ({"file_mappings": [{"type": "glob", "src": "a", "dst_dir": "b"}]}, "unknown field dst_dir"),
        ({"file_mappings": ["a"]}, "Expected object, got str - at $.file_mappings[0]"),
        ({"file_mappings": {"src": "a"}}, "Expected array, got object - at $.file_mappings"),
        ({"required_source_files": "a"}, "Expected array, got str"),
        ({"materializer_version": 2}, "Expected str, got int - at $.materializer_version"),
    ],
)
def test_manifest_that_is_none_is_refused(tmp_path: Path, content: Any, expected: str) -> None:
    assert expected in problem(tmp_path, content)


@pytest.mark.parametrize("path", ["../a", "a/../../b", "/etc/passwd", "", "a\0b", ".."])
@pytest.mark.parametrize(
    "fields",
    [
        lambda path: {"file_mappings": [{"src": path}]},
        lambda path: {"file_mappings": [{"src": "a", "dst": path}]},
        lambda path: {"file_mappings": [{"type": "tree", "src": path}]},
        lambda path: {"file_mappings": [{"type": "tree", "src": "a", "dst_dir": path}]},
        lambda path: {"file_mappings": [{"type": "glob", "src": path}]},
        lambda path: {"required_source_files": [path]},
        lambda path: {"custom_materializer": path},
    ],
    ids=["src", "dst", "tree", "dst_dir", "glob", "required", "materializer"],
)
def test_paths_that_lead_out_of_their_folder_are_refused(tmp_path: Path, path: str, fields: Any) -> None:
    assert "leads out of its folder; paths are relative, without '..'" in problem(tmp_path, fields(path))
