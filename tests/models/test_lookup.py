"""From what a user calls weights to their file."""

from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from sgld.models import lookup
from sgld.models.lookup import NotFound, find, is_hub_id, place

SUFFIXES = (".safetensors", ".pth")
COMMIT = "0" * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With weights in several files."""
    for name in ("a.safetensors", "b.pth", "c.pth", "README.md"):
        (tmp_path / name).write_text(name)
    return tmp_path


def test_a_file_is_itself_and_a_folder_is_its_best_file(folder: Path) -> None:
    assert find(str(folder / "b.pth"), SUFFIXES) == folder / "b.pth"
    assert find(str(folder), SUFFIXES) == folder / "a.safetensors"
    assert find(f"{folder}:c.pth", SUFFIXES) == folder / "c.pth"


def test_of_several_the_usual_one_is_meant(folder: Path) -> None:
    (folder / "a.safetensors").unlink()
    assert find(str(folder), SUFFIXES, ("d.*", "c.*")) == folder / "c.pth"
    with pytest.raises(NotFound, match=r"several files of weights; name one of them, as path:b\.pth"):
        find(str(folder), SUFFIXES)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://a.example/b.pth", "addresses aren't fetched; download the file"),
        ("{}/d.pth", "no such file or folder"),
        ("{}", r"no file of weights \(\.safetensors, \.pth\)"),
        ("{}:../b.pth", "no file 'b.pth'"),
        ("{}:link.pth", "no file 'link.pth'"),
    ],
)
def test_what_is_not_there_is_said(path: str, message: str, folder: Path) -> None:
    inside = folder / "inside"
    inside.mkdir()
    if "link" in path:
        (inside / "link.pth").symlink_to(folder / "b.pth")
    with pytest.raises(NotFound, match=message):
        find(path.format(inside), SUFFIXES)


@pytest.mark.parametrize("path", ["", "~nobody/a", "a\0b", "x" * 5000, "a/b/c", "./a/b", "a.safetensors"])
def test_what_is_nothing_is_an_error(path: str) -> None:
    with pytest.raises(NotFound, match="no such file or folder"):
        find(path, SUFFIXES)
    assert not is_hub_id(path)
    assert place(path) is None


def test_a_file_on_the_hub_is_fetched_with_what_belongs_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fetch(_repo: str, name: str, *, revision: None) -> str:
        fetched.append(name)
        return name

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(lookup, "names_in", lambda _repo, _revision: ["README.md", "in/b.pth"])
    assert find("owner/name", SUFFIXES) == find("owner/name:in/b.pth", SUFFIXES, beside="c.json") == Path("in/b.pth")
    assert fetched == ["in/b.pth", "in/b.pth", "in/c.json"]


def test_weights_are_not_taken_without_what_may_belong_to_them_where_the_hub_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weights of an adapter would be applied as if nothing more were known of it."""

    def fetch(_repo: str, name: str, *, revision: None) -> str:
        if name == "c.json":
            raise LocalEntryNotFoundError("the hub can't be reached")
        return name

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(NotFound, match="can't be reached"):
        find("owner/name:b.pth", SUFFIXES, beside="c.json")


def test_repositories_are_read_from_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "a.safetensors").write_text("a")
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for path in ("owner/name", "owner/name:a.safetensors"):
        assert find(path, SUFFIXES, beside="gone.json").read_text() == "a"
    with pytest.raises(NotFound):
        find("owner/name:b.safetensors", SUFFIXES)
