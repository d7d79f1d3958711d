import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.hub import Hub, running_hub
from sgld.errors import ModelError
from sgld.models.weight_files import Place, chosen_files, place_of, read_header, weights_at


@pytest.mark.parametrize(
    ("name", "repo", "path", "revision"),
    [
        ("owner/repo", "owner/repo", "", None),
        ("owner/repo/some/folder", "owner/repo", "some/folder", None),
        ("owner/repo:file.gguf", "owner/repo", "file.gguf", None),
        ("owner/repo:Q4_K_M", "owner/repo", "Q4_K_M", None),
        ("https://huggingface.co/owner/repo", "owner/repo", "", None),
        ("https://huggingface.co/owner/repo/tree/v2/folder/", "owner/repo", "folder", "v2"),
        ("https://huggingface.co/owner/repo/blob/v2/a/b.safetensors", "owner/repo", "a/b.safetensors", "v2"),
        ("https://hf.co/owner/repo/resolve/v2/b.gguf?download=true", "owner/repo", "b.gguf", "v2"),
    ],
)
def test_place_on_the_hub(name: str, repo: str, path: str, revision: str | None) -> None:
    assert place_of(name) == Place(name, None, path, repo, revision)


def test_place_on_this_machine(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.touch()
    assert place_of(str(file)) == Place(str(file), tmp_path, "a.safetensors")
    assert place_of(str(tmp_path)) == Place(str(tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["", "name", "/no/such/file.safetensors", "./a/b", "a b/c", "\0/x", "~nobody/x"])
def test_place_that_is_nowhere_is_told(name: str) -> None:
    with pytest.raises(ModelError, match="there is no file or folder"):
        place_of(name)


SHARDS = ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("names", "path", "chosen"),
    [
        (["a.safetensors", "b.json"], "", ("a.safetensors",)),
        (["a.safetensors", "b.safetensors"], "b.safetensors", ("b.safetensors",)),
        (["a.safetensors", "a-mixed.safetensors"], "", ("a-mixed.safetensors",)),
        ([*SHARDS, "m.safetensors.index.json"], "", SHARDS),
        ([*SHARDS, "m.safetensors.index.json", "x.safetensors"], "m.safetensors.index.json", SHARDS),
        (["f-Q4_K_M.gguf", "f-Q8_0.gguf", "README.md"], "Q4_K_M", ("f-Q4_K_M.gguf",)),
        (["f-Q4_K_M.gguf", "f-Q8_0.gguf"], "q8_0", ("f-Q8_0.gguf",)),
        (["x.safetensors", "t/a.safetensors", "t/deep/b.safetensors"], "t", ("t/a.safetensors",)),
        (["x.safetensors", "t/a.safetensors"], "", ("x.safetensors",)),
    ],
)
def test_files_that_are_meant(names: list[str], path: str, chosen: tuple[str, ...]) -> None:
    assert chosen_files(names, path, "it") == chosen


@pytest.mark.parametrize(
    ("names", "path", "problem"),
    [
        (["a.safetensors", "b.safetensors"], "", "has several files of weights; name one of them: a.safet.*, b.safet"),
        (["f-Q4_K_M.gguf", "g-Q4_K_M.gguf"], "Q4_K_M", "has several files"),
        (["config.json"], "", "it has no weights: no file there ends in .safetensors or .gguf"),
        (["a.safetensors"], "b.safetensors", "it has no weights"),
        (["model.bin"], "model.bin", "isn't a file of weights"),
        (["m.safetensors.index.json"], "m.safetensors.index.json", "is an index without its shards"),
    ],
)
def test_files_that_nobody_can_mean_are_told(names: list[str], path: str, problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        chosen_files(names, path, "it")


def test_config_counts_for_a_folder_but_not_for_a_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"n": 1}))
    assert weights_at(place_of(str(tmp_path))).config == {"n": 1}
    assert weights_at(place_of(str(tmp_path / "a.safetensors"))).config is None


def test_header_is_read_without_the_tensors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3, dtype=torch.float8_e4m3fn)}, tmp_path / "a.safetensors", metadata={"k": "v"})
    header = read_header(tmp_path / "a.safetensors")
    assert (header.tensors, header.metadata) == ({"a": ("F8_E4M3", (2, 3))}, {"k": "v"})


@pytest.mark.parametrize(
    "content", [b"", b"junk that is no file of weights", b"\xff" * 64, b"\x03" + 7 * b"\0" + b"[1]"]
)
def test_file_that_is_broken_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="can't be read"):
        read_header(tmp_path / "a.safetensors")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path / "hub") as hub:
        (tmp_path / "t").mkdir()
        save_file({"a": torch.ones(2)}, tmp_path / "t" / "a.safetensors")
        (tmp_path / "t" / "config.json").write_text('{"n": 2}')
        (tmp_path / "w-Q8_0.gguf").write_bytes(b"GGUF")
        (tmp_path / "w-Q4_0.gguf").write_bytes(b"GGUF")
        hub.put("o/r", tmp_path)
        yield hub


def test_weights_on_the_hub_are_fetched_with_their_config_and_nothing_else(hub: Hub) -> None:
    weights = weights_at(place_of("o/r/t"))
    assert (weights.files[0].name, weights.config) == ("a.safetensors", {"n": 2})
    assert weights.header().tensors == {"a": ("F32", (2,))}
    assert weights_at(place_of("o/r:q4_0")).files[0].name == "w-Q4_0.gguf"
    assert sorted(hub.asked) == ["r/t/a.safetensors", "r/t/config.json", "r/w-Q4_0.gguf"]


def test_weights_that_were_fetched_need_no_hub(hub: Hub) -> None:
    before = weights_at(place_of("o/r:Q4_0"))
    hub.repos.clear()
    assert weights_at(place_of("o/r:Q4_0")) == before


def test_weights_that_the_hub_does_not_have_are_told(hub: Hub) -> None:
    with pytest.raises(ModelError, match="o/none can't be fetched: "):
        weights_at(place_of("o/none:Q8"))
    with pytest.raises(ModelError, match=r"o/r has several files of weights; .*: w-Q4_0.gguf, w-Q8_0"):
        weights_at(place_of("o/r"))
