"""The weights of filters."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sgld.errors import InvalidRequest
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


def test_a_file_is_found_or_the_param_is_named(folder: Path) -> None:
    assert find(str(folder), FIELD) == folder / "a.safetensors"
    with pytest.raises(
        InvalidRequest, match=r"upscaling_model_path is '.*': there is no such file or folder"
    ) as raised:
        find(str(folder / "d.pth"), FIELD)
    assert raised.value.param == FIELD


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
