"""Which overlay belongs to a model."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.overlays import UNET_TREE, folder_of, made, names_in, overlay_in, source_in, write
from sgld.config import EngineConfig, SourceConfig
from sgld.errors import ModelError
from sgld.models.describe import describe
from sgld.models.manifest import MANIFEST_FILE
from sgld.models.materialize import materialized_root
from sgld.models.overlay import BUILT_IN, VARIABLE, Entry, find_model, matching, registry
from sgld.models.plan import plan
from sgld.models.resolve import INDEX_FILE


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return source_in(tmp_path)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the user's registry."""
    return lambda entries: monkeypatch.setenv(VARIABLE, json.dumps(entries))


def refusal(model_path: object = "org/model") -> str:
    with pytest.raises(ModelError) as caught:
        made(str(model_path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_registry_that_ships_has_only_entries() -> None:
    assert registry() == json.loads(BUILT_IN.read_text()) == {}


def test_entries_are_strings_or_objects(registered: Any) -> None:
    full = {"overlay_repo_id": "org/b", "overlay_revision": "1", "source_revision": "2"}
    registered({"org/x": "org/a", "org/y": full})
    assert registry() == {"org/x": Entry(overlay_repo_id="org/a"), "org/y": Entry(**full)}


def test_registry_may_be_a_file_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, {"overlays.json": '{"org/x": "org/a"}'})
    monkeypatch.setenv(VARIABLE, " ~/overlays.json\n")
    assert registry() == {"org/x": Entry(overlay_repo_id="org/a")}


def test_own_entries_replace_those_that_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: Any) -> None:
    write(tmp_path, {"built_in.json": '{"org/x": "org/a", "org/y": "org/b"}'})
    monkeypatch.setattr("sgld.models.overlay.BUILT_IN", tmp_path / "built_in.json")
    registered({"org/y": "own/b"})
    assert {key: entry.overlay_repo_id for key, entry in registry().items()} == {"org/x": "org/a", "org/y": "own/b"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", f"{VARIABLE} isn't a JSON object of models and their overlays: Input data was truncated"),
        ("missing.json", f"{VARIABLE} is 'missing.json': neither a JSON object nor a file that can be read: "),
        ('{"a/b": 1}', "the overlay of 'a/b' is 1: Expected object, got int; give the id or folder of an overlay, or"),
        ('{"a/b": {"overlay": "x"}}', "unknown field overlay"),
        ('{"a/b": {"source_revision": "x"}}', "Object missing required field overlay_repo_id"),
        ('{"a/b": ""}', "Expected str of length >= 1 - at $.overlay_repo_id"),
        ('{"a/b": {"overlay_repo_id": 1}}', "Expected str, got int - at $.overlay_repo_id"),
    ],
)
def test_entry_that_is_none_is_an_error_whatever_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    assert message in refusal()


@pytest.mark.parametrize("content", ["[]", '"a"', b"\xff"])
def test_file_that_is_no_registry_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | bytes
) -> None:
    write(tmp_path, {"overlays.json": content})
    monkeypatch.setenv(VARIABLE, str(tmp_path / "overlays.json"))
    assert str(tmp_path / "overlays.json") in refusal()


def test_a_name_matches_whole_and_a_folder_by_its_last_part_or_its_place_in_the_cache(tmp_path: Path) -> None:
    entry = Entry(overlay_repo_id="org/overlay")
    entries = {"Org/Model": entry, "org/tiny_image": entry}
    assert matching("sgld/tiny-image", entries) is None  # a name, though it is a folder
    for folder in ("Model", "model", "hub/models--org--model/snapshots/abc", "hub/models--org--models/snapshots/abc"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    found = {
        path: matching(path, entries) is entry
        for path in ("Org/Model", "Org/model", "Model", "other/Model", str(tmp_path / "missing" / "Model"))
    }
    assert found == dict.fromkeys(found, False) | {"Org/Model": True}
    folders = [path for path in tmp_path.rglob("*") if matching(str(path), entries)]
    assert sorted(str(path.relative_to(tmp_path)) for path in folders) == [
        *("Model", "hub/models--org--model", "hub/models--org--model/snapshots", "hub/models--org--model/snapshots/abc")
    ]


def test_registered_overlay_makes_the_model_of_a_folder_without_an_index(
    tmp_path: Path, source: Path, registered: Any
) -> None:
    registered({"org/source": {"overlay_repo_id": str(overlay_in(tmp_path, None))}})
    assert names_in(folder_of(source)) == ["README.md", INDEX_FILE, "unet/a.safetensors", "unet/more/b.json"]
    assert made(source).model_path == str(source)


def test_registered_overlay_without_a_manifest_is_the_model(tmp_path: Path, source: Path, registered: Any) -> None:
    complete = write(tmp_path / "complete", {INDEX_FILE: '{"_class_name": "P"}'})
    registered({"org/source": str(complete)})
    found = made(source)
    assert found.folder == complete
    assert found.notes == (f"{source} is replaced by {complete}, its overlay, which is complete",)


def test_registered_folder_that_is_neither_is_told(tmp_path: Path, source: Path, registered: Any) -> None:
    registered({"org/source": str(write(tmp_path / "empty", {"README.md": ""}))})
    message = refusal(source)
    assert f"has no {MANIFEST_FILE} to make a model, and is none: " in message
    assert f"has no {INDEX_FILE}" in message


def test_subfolder_is_not_for_models_that_are_made(tmp_path: Path, source: Path) -> None:
    config = EngineConfig(model_path=str(overlay_in(tmp_path, source)), source=SourceConfig(model_subfolder="a"))
    with pytest.raises(ModelError, match="model_subfolder isn't for models with an overlay"):
        find_model(config)


def test_overlay_given_as_the_model_must_name_its_source(tmp_path: Path) -> None:
    overlay = overlay_in(tmp_path, None)
    assert f"{MANIFEST_FILE} of overlay {overlay} has no source_model_id" in refusal(overlay)


def test_models_without_an_overlay_are_found_as_before(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", {INDEX_FILE: "{}"})
    assert (made(folder).folder, made(folder).notes) == (folder, ())
    assert made("sgld/tiny-image").notes == ()
    assert "there is no folder" in refusal("./missing")


def test_plan_says_what_the_model_was_made_of(tmp_path: Path, source: Path) -> None:
    overlay = overlay_in(tmp_path, source)
    planned = plan(EngineConfig(model_path=str(overlay), device="cpu"))
    assert planned.decisions()["model"] == f"materialised from overlay {overlay} and source {source}"
    assert [part.name for part in planned.components] == ["unet"]


def test_description_makes_nothing_and_says_what_will_be_made(tmp_path: Path, source: Path) -> None:
    overlay = overlay_in(tmp_path, source, custom_materializer="_overlay/make.py", file_mappings=[UNET_TREE])
    config = EngineConfig(model_path=str(overlay), device="cpu")
    expected = f"will be materialised from overlay {overlay} and source {source} when it is loaded"
    assert describe(config).decisions["model"] == expected
    assert not materialized_root().exists()
