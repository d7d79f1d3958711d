from pathlib import Path

import pytest

from sgld.storage.local import LocalStorage


def write_one(path: Path) -> None:
    path.write_bytes(b"one")


async def test_files_are_kept_until_their_folder_is_removed(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "results")
    await storage.put("a/0.png", b"zero", "image/png")
    await storage.put("b/0.png", write_one, "image/png")

    assert await storage.read("a/0.png") == b"zero"
    assert await storage.file("b/0.png") == tmp_path / "results" / "b" / "0.png"
    assert await storage.url("a/0.png") is None

    await storage.delete("a")
    await storage.delete("a")

    assert (await storage.read("a/0.png"), await storage.file("a/0.png")) == (None, None)
    assert await storage.read("b/0.png") == b"one"


@pytest.mark.parametrize("key", ["", "../a", "/etc/passwd", "a/../../b"])
async def test_keys_stay_in_the_folder(tmp_path: Path, key: str) -> None:
    with pytest.raises(AssertionError):
        await LocalStorage(tmp_path).read(key)
