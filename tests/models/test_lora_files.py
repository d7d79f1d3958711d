"""Where adapters are."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from sgld.errors import InvalidRequest
from sgld.models.lookup import is_hub_id, place
from sgld.models.lora_files import find, identity_now

COMMIT = "0" * 40


def problem_of(path: Path | str) -> str:
    with pytest.raises(InvalidRequest) as caught:
        find(str(path))
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.safetensors").write_text("a")
    (tmp_path / "README.md").write_text("")
    return tmp_path


def test_a_folder_has_one_file_or_the_usual_one_or_names_it(folder: Path) -> None:
    assert find(str(folder)).weights.name == "a.safetensors"
    (folder / "b.safetensors").write_text("b")
    assert "name one of them, as path:a.safetensors" in problem_of(folder)
    assert find(f"{folder}:b.safetensors").weights.name == "b.safetensors"
    (folder / "adapter_model.safetensors").write_text("c")
    (folder / "adapter_config.json").write_text('{"lora_alpha": 2}')
    assert find(str(folder)).config == {"lora_alpha": 2}


def test_what_is_not_in_a_folder_is_not_read(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    assert "it has no file of weights (.safetensors)" in problem_of(inner)
    assert "it has no file" in problem_of(f"{inner}:../a.safetensors")
    (inner / "link.safetensors").symlink_to(folder / "a.safetensors")
    assert "it has no file" in problem_of(f"{inner}:link.safetensors")


def test_a_broken_config_is_an_error(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")
    assert "can't be read" in problem_of(folder)


@pytest.mark.parametrize("path", ["", "~nobody/a", "a\0b", "x" * 5000, "a/b/c", "./a/b", "a.safetensors"])
def test_what_is_nothing_is_an_error(path: str) -> None:
    assert "can't be read" in problem_of(path)
    assert not is_hub_id(path)
    assert place(path) is None


def test_identity_of_what_is_here_is_known_at_any_time(folder: Path) -> None:
    assert identity_now(f"{folder}:a.safetensors") == find(str(folder)).identity == identity_now(str(folder))
    assert identity_now("owner/name") is None
    assert identity_now(str(folder / "gone.safetensors")) is None


def test_repositories_are_read_from_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "a.safetensors").write_text("a")
    (snapshot / "adapter_config.json").write_text('{"lora_alpha": 2}')
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    found = find("owner/name:a.safetensors")

    assert (found.weights.read_text(), found.config) == ("a", {"lora_alpha": 2})
    assert "can't be read" in problem_of("owner/name:b.safetensors")
    assert find("owner/name") == found
