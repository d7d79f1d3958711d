from datetime import datetime
from pathlib import Path

import pytest

from sgld.errors import InvalidRequest
from sgld.media.files import (
    FORMATS,
    extension_of,
    file_name,
    format_of,
    resolve_output,
    write_atomically,
    write_unique,
)

NOW = datetime(2026, 11, 22, 16, 30, 5)


def test_default_name_tells_prompt_and_time() -> None:
    name = file_name("A cat, sitting on a mat!", 42, "png", NOW)
    assert name.startswith("A_cat_sitting_on_a_mat_20261122-163005_")
    assert name.endswith(".png")
    assert len(Path(name).stem.rsplit("_", 1)[1]) == 8
    assert name != file_name("A cat, sitting on a mat!", 43, "png", NOW)


@pytest.mark.parametrize("prompt", ["", "../../etc/passwd", "\0\n", "🐻" * 200, "熊" * 500, "a" * 5000, "\ud800 x"])
def test_default_name_is_a_file_name_for_any_prompt(tmp_path: Path, prompt: str) -> None:
    name = file_name(prompt, 1, "mp4", NOW)
    assert len(name.encode()) <= 220
    path = resolve_output(tmp_path, name)
    assert path.parent == tmp_path.resolve()
    write_atomically(path, b"x")


def test_endings_and_formats_fit() -> None:
    assert format_of("a.b/C.PNG") == "png"
    assert format_of("x.jpg") == format_of("x.jpeg") == "jpeg"
    for media_format in FORMATS.values():
        assert format_of("x" + extension_of(media_format)) == media_format


@pytest.mark.parametrize("name", ["x", "x.bmp", ".png", "x.png.exe"])
def test_unknown_ending_is_refused_with_those_possible(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"must end in one of \.png, .*\.mp4") as caught:
        format_of(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["a.png", "sub/a.png", "ümlaut 熊.png", "./a.png", "a..b.png"])
def test_names_inside_the_folder_resolve(tmp_path: Path, name: str) -> None:
    assert resolve_output(tmp_path, name) == tmp_path.resolve() / name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "./", "sub/", "/etc/passwd", "../a.png", "sub/../../a.png", "sub/.."),
        *("a\0.png", "a\n.png", "..\\a.png", "C:\\a.png", "a\ud800.png", "x" * 300 + ".png"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(InvalidRequest) as caught:
        resolve_output(tmp_path, name)
    assert repr(name) in str(caught.value)
    assert caught.value.param == "output_file_name"


def test_symbolic_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder, outside = tmp_path / "outputs", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "link").symlink_to(outside)
    (folder / "file.png").symlink_to(outside / "file.png")
    (folder / "loop").symlink_to(folder / "loop")
    for name in ("link/a.png", "file.png", "loop/a.png"):
        with pytest.raises(InvalidRequest):
            resolve_output(folder, name)


def test_write_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.png"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("write", [write_atomically, write_unique])
def test_failed_write_leaves_what_was_there(tmp_path: Path, write: object) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"before")

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise RuntimeError("disk on fire")

    assert callable(write)
    with pytest.raises(RuntimeError, match="disk on fire"):
        write(path, fail)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_write_over_a_folder_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(path, b"x")
    assert list(tmp_path.iterdir()) == [path]


def test_nobody_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        assert not path.exists()
        assert temporary.parent == path.parent

    write_atomically(path, write)
    assert path.exists()


def test_unique_names_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    written = [write_unique(path, bytes([i])) for i in range(3)]
    assert [p.name for p in written] == ["a.png", "a-1.png", "a-2.png"]
    assert [p.read_bytes() for p in written] == [b"\0", b"\1", b"\2"]
    assert sorted(tmp_path.iterdir()) == sorted(written)
