import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sgld.models.resolve import ModelSource
from sgld.models.verdicts import Kept, KeptAxes, KeptLeaf, KeptMask, VerdictFile

KEPT = Kept(
    axes=(
        KeptAxes(
            key=("transformer", "forward", "x:T3"),
            arguments=(KeptLeaf((1, "x"), 0, 1), KeptLeaf((1, "rows", 0), None, 2)),
            results=(KeptLeaf((0,), 0, 1),),
            lengths=(((1, "x"), 1),),
            masks=(KeptMask((1, "mask"), (1, "x"), "torch.bool"),),
        ),
    ),
    modes={"transformer": "merge"},
)
INDEX: dict[str, Any] = {"_class_name": "FluxPipeline"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache"


def file(folder: Path | None = None, name: str = "a/model", **index: Any) -> VerdictFile:
    return VerdictFile(ModelSource(name, folder), INDEX | index)


def only(cache: Path) -> Path:
    (found,) = (cache / "learned").glob("[!.]*")
    return found


@pytest.mark.usefixtures("cache")
def test_what_was_written_is_read() -> None:
    file().write(KEPT)
    assert file().read() == KEPT


@pytest.mark.usefixtures("cache")
def test_nothing_is_kept_of_a_model_that_was_not_seen() -> None:
    assert file().read() == Kept()


def test_what_others_wrote_meanwhile_stays_but_for_what_is_news(cache: Path) -> None:
    file().write(Kept(modes={"unet": "merge", "vae": "merge"}))
    before = file().read()
    file().write(Kept(KEPT.axes, {"unet": "exclusive", "vae": "merge", "text": "merge"}), before)
    file().write(Kept(modes={"unet": "merge", "vae": "interleave"}), before)
    assert file().read() == Kept(KEPT.axes, {"unet": "exclusive", "vae": "interleave", "text": "merge"})
    assert only(cache).suffix == ".json"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b'{"axes": 3}', b'{"modes": {"a": 1}}', b'{"axes": [["a", "b"]]}'],
)
def test_file_that_can_not_be_read_is_nothing(cache: Path, content: bytes) -> None:
    file().write(KEPT)
    only(cache).write_bytes(content)
    assert file().read() == Kept()


def test_fields_of_a_later_version_are_left_out(cache: Path) -> None:
    file().write(KEPT)
    only(cache).write_text(json.dumps(json.loads(only(cache).read_text()) | {"new": [1]}))
    assert file().read() == KEPT


def test_folder_that_can_not_be_written_is_no_error(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file where the folder should be")
    file().write(KEPT)
    assert "can't be kept" in caplog.text
    assert file().read() == Kept()


@pytest.mark.usefixtures("cache")
def test_each_configuration_has_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    config = tmp_path / "unet" / "config.json"
    config.write_text('{"layers": 1}')
    file(tmp_path).write(KEPT)
    assert file(tmp_path).read() == KEPT
    copy = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-copy"))
    assert file(copy).read() == Kept()
    assert file(tmp_path, scheduler=["diffusers", "DDIMScheduler"]).read() == Kept()
    config.write_text('{"layers": 2}')
    assert file(tmp_path).read() == Kept()


@pytest.mark.usefixtures("cache")
def test_a_folder_is_the_same_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    file(tmp_path / "model", name=str(tmp_path / "model")).write(KEPT)
    monkeypatch.chdir(tmp_path)
    assert file(Path("model"), name="model").read() == KEPT
