"""Where adapters are."""

from pathlib import Path

import pytest

from sgld.errors import InvalidRequest
from sgld.models.lora_files import find, identity_now


def problem_of(path: Path | str) -> str:
    with pytest.raises(InvalidRequest) as caught:
        find(str(path))
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.safetensors").write_text("a")
    (tmp_path / "README.md").write_text("")
    return tmp_path


def test_a_folder_has_one_file_or_that_of_peft_with_its_config(folder: Path) -> None:
    assert find(str(folder)).weights.name == "a.safetensors"
    (folder / "b.safetensors").write_text("b")
    assert "name one of them, as path:a.safetensors" in problem_of(folder)
    assert find(f"{folder}:b.safetensors").weights.name == "b.safetensors"
    (folder / "adapter_model.safetensors").write_text("c")
    (folder / "adapter_config.json").write_text('{"lora_alpha": 2}')
    assert find(str(folder)).config == {"lora_alpha": 2}


def test_other_files_than_safetensors_are_not_read(folder: Path) -> None:
    (folder / "b.pt").write_text("b")
    assert "only .safetensors files are read, as others may run code" in problem_of(folder / "b.pt")


def test_what_is_not_there_and_a_broken_config_are_errors(folder: Path) -> None:
    assert "the LoRA adapter 'a/b/c' can't be read: there is no such file" in problem_of("a/b/c")
    (folder / "adapter_config.json").write_text("{")
    assert "can't be read" in problem_of(folder)


def test_identity_of_what_is_here_is_known_at_any_time(folder: Path) -> None:
    assert identity_now(f"{folder}:a.safetensors") == find(str(folder)).identity == identity_now(str(folder))
    assert identity_now("owner/name") is None
    assert identity_now(str(folder / "gone.safetensors")) is None
