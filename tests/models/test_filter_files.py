"""From what a user calls weights to their file."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sgld.errors import InvalidRequest
from sgld.models import lookup
from sgld.models.filter_files import Unreadable, find, read
from sgld.models.super_resolution import unwrapped

FIELD = "upscaling_model_path"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With weights in several files."""
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    for name in ("b.pth", "c.pth", "flownet.pkl"):
        torch.save({"a": torch.ones(2)}, tmp_path / name)
    return tmp_path


def test_a_file_is_itself_and_a_folder_is_its_safetensors(folder: Path) -> None:
    assert find(str(folder / "b.pth"), FIELD) == folder / "b.pth"
    assert find(str(folder), FIELD) == folder / "a.safetensors"
    assert find(f"{folder}:c.pth", FIELD) == folder / "c.pth"


def test_of_several_the_usual_one_is_meant(folder: Path) -> None:
    (folder / "a.safetensors").unlink()
    assert find(str(folder), FIELD, ("c.*",)) == folder / "c.pth"
    with pytest.raises(InvalidRequest, match=r"several files of weights; name one of them, as path:b\.pth"):
        find(str(folder), FIELD)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://a.example/b.pth", "addresses aren't fetched; download the file"),
        ("{}/d.pth", "no such file or folder"),
        ("{}:../b.pth", "has no file"),
        ("", "no such file or folder"),
        ("a\0b", "no such file or folder"),
    ],
)
def test_what_is_not_there_is_said(path: str, message: str, folder: Path) -> None:
    (folder / "inside").mkdir()
    with pytest.raises(InvalidRequest, match=message) as raised:
        find(path.format(folder / "inside"), FIELD)
    assert raised.value.param == FIELD


def test_a_file_on_the_hub_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {("owner/name", "b.pth"): Path("fetched")}
    monkeypatch.setattr(lookup, "hub_file", lambda repo, name, _revision: there[repo, name])
    monkeypatch.setattr(lookup, "names_in", lambda _repo, _revision: ["README.md", "b.pth"])
    assert find("owner/name", FIELD) == find("owner/name:b.pth", FIELD) == Path("fetched")


def test_weights_are_read_from_both_forms(folder: Path) -> None:
    for name in ("a.safetensors", "b.pth", "flownet.pkl"):
        (weights,) = unwrapped(read(folder / name)).values()
        assert weights.tolist() == [1, 1]


class Harmful:
    """A pickle of it runs a program."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harmful()}, tmp_path / "bad.pth")
    (tmp_path / "text.pth").write_text("nothing")
    (tmp_path / "text.safetensors").write_text("nothing")
    (tmp_path / "cut.pkl").write_bytes(b"\x80")
    for name in ("bad.pth", "text.pth", "text.safetensors", "cut.pkl", "missing.pth"):
        with pytest.raises(Unreadable, match=name):
            read(tmp_path / name)
    assert not (tmp_path / "harm").exists()
