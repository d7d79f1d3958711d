import os
from pathlib import Path

import pytest

from models.overlays import names_in, source_in, write
from sgld.errors import ModelError
from sgld.models.manifest import AnyMapping, FileMapping, GlobMapping, TreeMapping
from sgld.models.mapping import LINKED_FROM_BYTES, apply, files_below


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return source_in(tmp_path)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "output").mkdir()
    return tmp_path / "output"


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        (FileMapping(src="weights/more/b.json"), ["b.json"]),
        (FileMapping(src="weights/a.safetensors", dst="unet/model.safetensors"), ["unet/model.safetensors"]),
        (TreeMapping(src="weights"), ["weights/a.safetensors", "weights/more/b.json"]),
        (TreeMapping(src="weights", dst_dir="unet"), ["unet/a.safetensors", "unet/more/b.json"]),
        (
            TreeMapping(src=".", dst_dir="all"),
            ["all/notes.txt", "all/weights/a.safetensors", "all/weights/more/b.json"],
        ),
        (GlobMapping(src="**/*.json"), ["weights/more/b.json"]),
        (GlobMapping(src="*"), ["notes.txt"]),
    ],
)
def test_files_go_where_the_mapping_says(source: Path, output: Path, mapping: AnyMapping, expected: list[str]) -> None:
    apply(mapping, source, output)
    assert names_in(output) == expected
    contents = {path.name: path.read_text() for path in files_below(source)} | {"model.safetensors": "A"}
    assert [(output / name).read_text() for name in expected] == [contents[Path(name).name] for name in expected]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (FileMapping(src="weights"), "has no file 'weights', which a file mapping names"),
        (FileMapping(src="missing"), "has no file 'missing', which a file mapping names"),
        (TreeMapping(src="notes.txt"), "has no folder 'notes.txt', which a tree mapping names"),
        (TreeMapping(src="missing"), "has no folder 'missing', which a tree mapping names"),
        (GlobMapping(src="*.bin"), "matches '*.bin', which a glob mapping names"),
        (GlobMapping(src="weights"), "matches 'weights', which a glob mapping names"),
    ],
)
def test_mapping_without_files_is_refused(source: Path, output: Path, mapping: AnyMapping, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        apply(mapping, source, output)
    assert message in str(caught.value)
    assert str(source) in str(caught.value)


@pytest.mark.parametrize(
    "mapping",
    [
        FileMapping(src="weights/link"),
        FileMapping(src="way/secret"),
        TreeMapping(src="weights"),
        TreeMapping(src="way"),
        TreeMapping(src=".", dst_dir="all"),
        GlobMapping(src="weights/*"),
        GlobMapping(src="way/*"),
    ],
)
def test_links_that_lead_out_of_the_source_are_refused(
    source: Path, output: Path, tmp_path: Path, mapping: AnyMapping
) -> None:
    secret = write(tmp_path / "elsewhere", {"secret": "S"}) / "secret"
    (source / "weights" / "link").symlink_to(secret)
    (source / "way").symlink_to(secret.parent)
    with pytest.raises(ModelError, match=r"secret|elsewhere") as caught:
        apply(mapping, source, output)
    assert "files of overlays and sources stay in their folders" in str(caught.value)
    assert "S" not in [path.read_text() for path in output.rglob("*") if path.is_file()]


def test_links_inside_of_the_source_are_followed_and_circles_end(source: Path, output: Path) -> None:
    (source / "weights" / "link").symlink_to(source / "notes.txt")
    (source / "weights" / "more" / "back").symlink_to(source / "weights")
    apply(TreeMapping(src="weights"), source, output)
    assert names_in(output) == ["weights/a.safetensors", "weights/link", "weights/more/b.json"]
    assert not (output / "weights" / "link").is_symlink()


def test_links_of_the_hub_s_cache_lead_to_its_blobs_but_not_to_other_models(tmp_path: Path, output: Path) -> None:
    repo = write(tmp_path / "models--org--name", {"blobs/1": "A", "snapshots/abc/x": ""})
    other = write(tmp_path / "models--org--other", {"blobs/1": "B"})
    snapshot = repo / "snapshots" / "abc"
    (snapshot / "a").symlink_to("../../blobs/1")
    (snapshot / "b").symlink_to(other / "blobs" / "1")
    apply(FileMapping(src="a"), snapshot, output)
    assert (output / "a").read_text() == "A"
    with pytest.raises(ModelError, match="stay in their folders"):
        apply(FileMapping(src="b"), snapshot, output)


def test_large_files_are_linked_and_never_written_into(source: Path, output: Path) -> None:
    os.truncate(source / "weights" / "a.safetensors", LINKED_FROM_BYTES)
    apply(FileMapping(src="weights/a.safetensors", dst="x"), source, output)
    apply(FileMapping(src="notes.txt", dst="y"), source, output)
    assert (output / "x").samefile(source / "weights" / "a.safetensors")
    assert not (output / "y").samefile(source / "notes.txt")
    apply(FileMapping(src="notes.txt", dst="x"), source, output)
    assert (output / "x").read_text() == "N"
    assert (source / "weights" / "a.safetensors").stat().st_size == LINKED_FROM_BYTES


def test_large_files_are_copied_where_there_are_no_links(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    os.truncate(source / "weights" / "a.safetensors", LINKED_FROM_BYTES)
    apply(FileMapping(src="weights/a.safetensors", dst="x"), source, output)
    assert (output / "x").stat().st_size == LINKED_FROM_BYTES
    assert not (output / "x").samefile(source / "weights" / "a.safetensors")
