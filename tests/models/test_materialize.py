"""What overlays make, and what of it survives."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from models.overlays import (
    INDEX,
    UNET_TREE,
    WAITING,
    folder_of,
    made,
    names_in,
    overlay_in,
    source_in,
    start_making,
    write,
)
from sgld.errors import ModelError
from sgld.models.materialize import MARKER_FILE, TEMPORARY, materialized_root
from sgld.models.resolve import INDEX_FILE

MATERIALIZER = "_overlay/make.py"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return source_in(tmp_path)


@pytest.fixture
def overlay(tmp_path: Path, source: Path) -> Path:
    return overlay_in(tmp_path, source)


def failure(overlay: Path, **config: Any) -> str:
    """What is told of a model that can't be made, of which nothing is left."""
    with pytest.raises(ModelError) as caught:
        made(overlay, **config)
    assert "\n" not in str(caught.value)
    left = [path for path in materialized_root().glob("*") if path.name != ".locks"]
    assert left == []
    return str(caught.value)


def test_model_has_files_of_the_overlay_and_of_its_source(overlay: Path) -> None:
    write(overlay, {"scheduler/scheduler_config.json": "{}", "unet/more/b.json": "replaced", "own.bin": "weights"})
    folder = folder_of(overlay)
    assert folder.parent == materialized_root()
    assert names_in(folder) == [
        *("README.md", INDEX_FILE, "scheduler/scheduler_config.json", "unet/a.safetensors", "unet/more/b.json")
    ]
    assert (folder / "unet" / "more" / "b.json").read_text() == "B"


def test_note_names_overlay_and_source(overlay: Path, source: Path) -> None:
    assert made(overlay).notes == (f"materialised from overlay {overlay} and source {source}",)


def test_model_is_made_once(overlay: Path) -> None:
    folder = folder_of(overlay)
    inode = (folder / "unet" / "a.safetensors").stat().st_ino
    os.utime(folder / MARKER_FILE, (0, 0))
    assert folder_of(overlay) == folder
    assert (folder / "unet" / "a.safetensors").stat().st_ino == inode
    assert (folder / MARKER_FILE).stat().st_mtime > 0  # when it was used last


@pytest.mark.parametrize("damage", ["missing", "short", "marker"])
def test_model_that_is_not_whole_is_made_again(overlay: Path, damage: str) -> None:
    folder = folder_of(overlay)
    weights = folder / "unet" / "a.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "short":
        weights.write_text("")
    else:
        (folder / MARKER_FILE).write_text("{")
    assert folder_of(overlay) == folder
    assert weights.read_text() == "A"


@pytest.mark.parametrize(
    "changed", ["overlay/README.md", "overlay/new.json", "source/weights/a.safetensors", "source/new"]
)
def test_other_files_make_another_model(overlay: Path, tmp_path: Path, changed: str) -> None:
    before = folder_of(overlay)
    write(tmp_path, {changed: "changed"})
    after = folder_of(overlay)
    assert after != before
    assert before.is_dir()
    assert (after / "unet" / "a.safetensors").read_text() == ("changed" if "weights" in changed else "A")


def test_another_version_of_the_materializer_makes_another_model(overlay: Path, tmp_path: Path, source: Path) -> None:
    before = folder_of(overlay)
    assert folder_of(overlay_in(tmp_path, source, materializer_version="v2")) != before


def test_bytecode_and_git_are_no_part_of_an_overlay(overlay: Path) -> None:
    before = folder_of(overlay)
    write(overlay, {"__pycache__/pipeline.pyc": "", ".git/HEAD": ""})
    assert folder_of(overlay) == before


def test_own_code_makes_files_if_it_is_trusted(tmp_path: Path, source: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "def materialize(*, overlay_dir, source_dir, output_dir, manifest):\n"
        "    text = (Path(source_dir) / 'notes.txt').read_text() + (Path(overlay_dir) / 'README.md').read_text()\n"
        "    (Path(output_dir) / 'unet' / 'made').write_text(text + manifest['materializer_version'])\n"
    )
    fields = {"custom_materializer": MATERIALIZER, "materializer_version": "7"}
    overlay = overlay_in(tmp_path, source, files={MATERIALIZER: code}, **fields)
    assert "read it, and allow it with --trust-remote-code" in failure(overlay)
    folder = folder_of(overlay, trust_remote_code=True)
    assert (folder / "unet" / "made").read_text() == "Nan overlay7"
    assert not (overlay / "_overlay" / "__pycache__").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1", "must define materialize(overlay_dir, source_dir, output_dir, manifest)"),
        ("def materialize(**_): raise KeyError('no such tensor')", "failed: KeyError: 'no such tensor'"),
        ("def materialize(): pass", "failed: TypeError: materialize() got an unexpected keyword argument"),
        ("raise SystemExit('stop')", "failed: SystemExit: stop"),
        ("def :", "failed: SyntaxError: invalid syntax"),
        (None, "has no _overlay/make.py, its materializer"),
    ],
)
def test_own_code_that_fails_is_told(tmp_path: Path, source: Path, code: str | None, message: str) -> None:
    files = {MATERIALIZER: code} if code is not None else {}
    overlay = overlay_in(tmp_path, source, files=files, custom_materializer=MATERIALIZER)
    assert message in failure(overlay, trust_remote_code=True)


def test_required_files_of_a_folder_must_be_there(tmp_path: Path, source: Path) -> None:
    overlay = overlay_in(tmp_path, source, required_source_files=["notes.txt", "x/y", "z"])
    assert failure(overlay) == f"the source {source} lacks x/y, z, which overlay {overlay} requires"


def test_component_that_nothing_makes_is_told(tmp_path: Path, source: Path) -> None:
    index = INDEX | {"vae": ["diffusers", "V"], "image_encoder": [None, None], "sizes": [1, 2]}
    overlay = overlay_in(tmp_path, source, index=index)
    assert failure(overlay).startswith(f"overlay {overlay} makes no vae of {source}, which its model_index.json names")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"_diffusers_version": "1"}, "has no _class_name"),
        ({"_class_name": "P"}, "has no _diffusers_version"),
        ({}, "has no _class_name and no _diffusers_version"),
        ([], "can't be read: Expected `object`, got `array`"),
    ],
)
def test_index_of_an_overlay_must_be_one(tmp_path: Path, source: Path, index: Any, message: str) -> None:
    assert f"model_index.json of overlay {tmp_path / 'overlay'} {message}" in failure(
        overlay_in(tmp_path, source, index=index)
    )


def test_overlay_without_an_index_is_told(overlay: Path) -> None:
    (overlay / INDEX_FILE).unlink()
    assert "model_index.json of overlay" in failure(overlay)


def test_links_that_lead_out_of_the_overlay_are_refused(overlay: Path, tmp_path: Path) -> None:
    (overlay / "key.json").symlink_to(write(tmp_path / "elsewhere", {"secret": "S"}) / "secret")
    assert "files of overlays and sources stay in their folders" in failure(overlay)


@pytest.mark.parametrize("dst", [".", "unet", "README.md/x"])
def test_file_in_the_place_of_a_folder_is_told(tmp_path: Path, source: Path, dst: str) -> None:
    overlay = overlay_in(tmp_path, source, file_mappings=[UNET_TREE, {"src": "notes.txt", "dst": dst}])
    assert f"{source} can't be materialised with overlay {overlay}: " in failure(overlay)


def test_cache_that_can_not_be_written_to_is_told(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(overlay / "README.md"))
    with pytest.raises(ModelError, match="can't be materialised with overlay"):
        made(overlay)


def waiting_overlay(tmp_path: Path, source: Path) -> Path:
    os.mkfifo(tmp_path / "go")
    return overlay_in(
        tmp_path, source, file_mappings=[], files={MATERIALIZER: WAITING}, custom_materializer=MATERIALIZER
    )


def test_two_processes_make_a_model_once(tmp_path: Path, source: Path) -> None:
    overlay = waiting_overlay(tmp_path, source)
    processes = [start_making(overlay) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
    (tmp_path / "go").write_text("\n")
    folders = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "made\n"
    (folder,) = map(Path, folders)
    assert names_in(folder) == ["README.md", INDEX_FILE, "unet/half"]


def test_process_that_is_killed_in_the_middle_leaves_nothing_that_counts(tmp_path: Path, source: Path) -> None:
    overlay = waiting_overlay(tmp_path, source)
    process = start_making(overlay)
    with (tmp_path / "go").open("w"):  # opens when the other side reads
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    (left,) = (path for path in materialized_root().iterdir() if path.name != ".locks")
    assert left.name.endswith(TEMPORARY)
    assert (left / "unet" / "half").exists()
    # Another model's start removes it, and the next of this one makes it whole.
    folder_of(overlay_in(tmp_path / "other", source))
    assert not left.exists()
    process = start_making(overlay)
    (tmp_path / "go").write_text("\n")
    folder = Path(process.communicate(timeout=60)[0].split()[-1])
    assert names_in(folder) == ["README.md", INDEX_FILE, "unet/half"]
    assert (tmp_path / "log").read_text() == "made\nmade\n"


def test_what_another_process_works_on_is_left_alone(tmp_path: Path, source: Path) -> None:
    overlay = waiting_overlay(tmp_path, source)
    process = start_making(overlay)
    with (tmp_path / "go").open("w") as pipe:
        folder_of(overlay_in(tmp_path / "other", source))
        pipe.write("\n")
    folder = Path(process.communicate(timeout=60)[0].split()[-1])
    assert names_in(folder) == ["README.md", INDEX_FILE, "unet/half"]


def test_model_survives_its_source(overlay: Path, source: Path) -> None:
    folder = folder_of(overlay)
    shutil.rmtree(source)
    assert json.loads((folder / INDEX_FILE).read_text()) == INDEX
    assert (folder / "unet" / "a.safetensors").read_text() == "A"
