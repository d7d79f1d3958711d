from pathlib import Path

import pytest

from sgld.errors import HookFailed
from sgld.fields import FieldError
from sgld.media.files import write_atomically
from sgld.media.hook import hooked, hooked_bytes, load_hook


def sign(path: Path, media_type: str) -> None:
    path.write_bytes(path.read_bytes() + f" signed as {media_type}".encode())


def replace(path: Path, media_type: str) -> None:
    other = path.with_suffix(".signed")
    other.write_bytes(b"another")
    other.replace(path)


def fail(path: Path, media_type: str) -> None:
    raise RuntimeError("no key")


def test_files_are_kept_as_the_hook_leaves_them(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", hooked(b"picture", sign, "image/png"))
    write_atomically(tmp_path / "b", hooked(lambda path: path.touch(), replace, "video/mp4"))
    write_atomically(tmp_path / "c", hooked(b"picture", None, "image/png"))

    assert (tmp_path / "a").read_bytes() == b"picture signed as image/png"
    assert (tmp_path / "b").read_bytes() == b"another"
    assert (tmp_path / "c").read_bytes() == b"picture"
    assert hooked_bytes(b"picture", sign, "image/webp") == b"picture signed as image/webp"


def test_nothing_is_kept_where_it_fails(tmp_path: Path) -> None:
    with pytest.raises(HookFailed, match="the file isn't kept: RuntimeError: no key"):
        write_atomically(tmp_path / "a", hooked(b"picture", fail, "image/png"))

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["nowhere:f", "pathlib:nothing", "pathlib", ":f", "sgld:__name__"])
def test_a_hook_that_isnt_there_is_told(name: str) -> None:
    with pytest.raises(FieldError, match="output_hook is"):
        load_hook(name)
