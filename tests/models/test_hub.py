"""Overlays and sources on the hub."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.hub import Hub, running_hub
from models.overlays import folder_of, made, names_in, overlay_in, source_in, write
from sgld.errors import ModelError
from sgld.models.hub import fetch, has_file
from sgld.models.overlay import VARIABLE
from sgld.models.resolve import INDEX_FILE

_PATH = "/{repo_id}/resolve/{revision}/{filename}"
MADE = ["README.md", INDEX_FILE, "unet/a.safetensors", "unet/more/b.json"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path / "hub") as hub:
        hub.put("org/source", source_in(tmp_path))
        yield hub


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda **entry: monkeypatch.setenv(VARIABLE, json.dumps({"org/source": entry}))


def test_overlay_on_the_hub_makes_a_model_of_a_source_on_the_hub(tmp_path: Path, hub: Hub) -> None:
    overlay = overlay_in(tmp_path, "org/source", source_allow_patterns=["weights/*"])
    hub.put("org/overlay", write(overlay, {"own.safetensors": "not fetched"}))
    folder = folder_of("org/overlay")
    assert names_in(folder) == MADE
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert "overlay/own.safetensors" not in hub.asked
    assert "source/notes.txt" not in hub.asked
    asked = list(hub.asked)
    assert folder_of("org/overlay") == folder
    assert hub.asked == asked


def test_overlay_on_the_hub_takes_no_folder_of_this_machine(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = write(tmp_path / "org" / "source", {"weights/key": "K"})
    for number, source in enumerate((str(private), "../org/source", "~/source")):
        hub.put(f"org/overlay{number}", overlay_in(tmp_path, source))
        with pytest.raises(ModelError, match="which isn't an id on the hub"):
            made(f"org/overlay{number}")
    hub.put("org/overlay", overlay_in(tmp_path, "org/source"))
    monkeypatch.chdir(tmp_path)
    assert names_in(folder_of("org/overlay")) == MADE


def test_revisions_of_the_registry_and_of_the_flag_are_taken(tmp_path: Path, hub: Hub, registered: Any) -> None:
    hub.put("org/overlay", overlay_in(tmp_path, None, source_revision="old"), "v2")
    for revision in ("old", "new", "newest"):
        hub.put("org/source", write(tmp_path / revision, {"weights/a.safetensors": revision}), revision)
    contents = []
    for entry, flag in (({}, None), ({"source_revision": "new"}, None), ({"source_revision": "new"}, "newest")):
        registered(overlay_repo_id="org/overlay", overlay_revision="v2", **entry)
        contents.append((folder_of("org/source", revision=flag) / "unet" / "a.safetensors").read_text())
    assert contents == ["old", "new", "newest"]
    assert made("org/source", revision="newest").notes == (
        "materialised from overlay org/overlay at v2 and source org/source at newest",
    )


def test_registered_repo_without_a_manifest_is_the_model_at_its_revision(
    tmp_path: Path, hub: Hub, registered: Any
) -> None:
    hub.put("org/complete", write(tmp_path / "complete", {INDEX_FILE: "{}"}), "v2")
    registered(overlay_repo_id="org/complete", overlay_revision="v2")
    source = made("org/source")
    assert (source.pretrained_name, source.folder, source.revision) == ("org/complete", None, "v2")
    assert source.notes == ("org/source is replaced by org/complete at v2, its overlay, which is complete",)


def test_model_on_the_hub_without_an_overlay_stays_there(tmp_path: Path, hub: Hub) -> None:
    hub.put("org/model", write(tmp_path / "model", {INDEX_FILE: "{}"}))
    source = made("org/model", revision="main")
    assert (source.pretrained_name, source.folder, source.revision, source.notes) == ("org/model", None, "main", ())


def test_required_files_that_the_cache_lost_are_fetched_again(tmp_path: Path, hub: Hub) -> None:
    overlay = overlay_in(
        tmp_path, "org/source", required_source_files=["notes.txt"], source_allow_patterns=["weights/*"]
    )
    cached = fetch("org/source", None)
    for lost in cached.rglob("notes.txt"):
        lost.resolve().unlink()  # the blob; the link to it stays
    assert names_in(folder_of(overlay)) == MADE
    assert hub.asked.count("source/notes.txt") == 2


def test_required_files_that_the_hub_lacks_are_told(tmp_path: Path, hub: Hub) -> None:
    overlay = overlay_in(tmp_path, "org/source", required_source_files=["notes.txt", "x"])
    message = f"org/source on the hub lacks x, which overlay {overlay} requires; they were asked for twice"
    with pytest.raises(ModelError) as caught:
        made(overlay)
    assert str(caught.value) == message


def test_made_model_needs_no_hub(tmp_path: Path, hub: Hub) -> None:
    overlay = overlay_in(tmp_path, "org/source")
    folder = folder_of(overlay)
    hub.repos.clear()
    shutil.rmtree(tmp_path / "hub")
    assert folder_of(overlay) == folder


@pytest.mark.parametrize("how", ["offline", "unreachable"])
def test_overlay_that_was_fetched_needs_no_hub(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    hub.put("org/overlay", overlay_in(tmp_path, "org/source"))
    folder = folder_of("org/overlay")
    if how == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        nowhere = "http://127.0.0.1:9"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", nowhere + _PATH)
    assert folder_of("org/overlay") == folder


@pytest.mark.parametrize("model_path", ["org/missing", "source of overlay", "registered"])
def test_what_the_hub_does_not_have_is_told_in_one_line(
    tmp_path: Path, hub: Hub, registered: Any, model_path: str
) -> None:
    if model_path == "registered":
        registered(overlay_repo_id="org/missing")
        model_path = "org/source"
    elif model_path == "source of overlay":
        model_path = str(overlay_in(tmp_path, "org/missing"))
    with pytest.raises(ModelError, match="org/missing can't be fetched: ") as caught:
        fetch("org/missing", None) if model_path == "org/missing" else made(model_path)
    assert "\n" not in str(caught.value)


def test_hub_that_says_nothing_is_no_answer(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_file("org/source", "notes.txt", None)
    assert not has_file("org/source", "missing.txt", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert has_file("org/source", "notes.txt", None)
    with pytest.raises(ModelError, match="org/other can't be fetched"):
        has_file("org/other", "notes.txt", None)
