import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from models.overlays import folder_of, overlay_in, source_in, write
from sgld.config import cache_root
from sgld.errors import InvalidRequest
from sgld.models.cache import CacheItem, cache_items, chosen, prune
from sgld.models.materialize import MARKER_FILE, TEMPORARY, locked, materialized_root

DAY_S = 86400.0


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    return overlay_in(tmp_path, source_in(tmp_path))


def item(name: str, **fields: object) -> CacheItem:
    given = {"kind": "model", "path": "", "size_bytes": 0, "used_at": time.time(), "state": "current"} | fields
    return CacheItem(name=name, **given)  # type: ignore[arg-type]


def states() -> dict[str, str]:
    return {item.name: item.state for item in cache_items()}


def test_empty_cache_has_nothing() -> None:
    assert cache_items() == []


def test_model_tells_what_it_was_made_of(overlay: Path, tmp_path: Path) -> None:
    folder = folder_of(overlay)
    os.utime(folder / MARKER_FILE, (1, 1000))
    write(materialized_root() / "of-somebody-else", {"x": ""})
    (found,) = cache_items()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert found == CacheItem(
        kind="model",
        name=folder.name,
        path=str(folder),
        size_bytes=size,
        used_at=1000,
        state="current",
        source=str(tmp_path / "source"),
        overlay=str(overlay),
    )


@pytest.mark.parametrize(
    ("change", "state"),
    [
        (lambda root: write(root, {"overlay/README.md": "new"}), "outdated"),
        (lambda root: write(root, {"source/new": "new"}), "outdated"),
        (lambda root: (root / "source").rename(root / "moved"), "unknown"),
        (lambda root: (root / "overlay").rename(root / "moved"), "unknown"),
        (lambda root: write(root, {"elsewhere": "new"}), "current"),
    ],
)
def test_state_is_that_of_its_inputs(
    overlay: Path, tmp_path: Path, change: Callable[[Path], object], state: str
) -> None:
    folder = folder_of(overlay)
    change(tmp_path)
    assert states() == {folder.name: state}


def test_what_was_learned_is_listed_with_its_model() -> None:
    write(cache_root() / "learned", {"abc.json": "{}", "times-abc.json": '{"model": "m"}', "broken.json": "{"})
    assert [(item.name, item.source) for item in cache_items()] == [("abc", ""), ("broken", ""), ("times-abc", "m")]


def test_useless_is_what_is_outdated_or_interrupted() -> None:
    items = [item("a"), item("b", state="outdated"), item("c", state="interrupted"), item("d", state="unknown")]
    assert [item.name for item in chosen(items)] == ["b", "c"]
    assert chosen(items, takes_all=True) == items


def test_names_and_age_choose_together() -> None:
    old = time.time() - 3 * DAY_S
    items = [item("a", used_at=old), item("b"), item("c", used_at=old)]
    assert [item.name for item in chosen(items, older_than_s=2 * DAY_S)] == ["a", "c"]
    assert [item.name for item in chosen(items, names=["a", "b"])] == ["a", "b"]
    assert [item.name for item in chosen(items, names=["a", "b"], older_than_s=2 * DAY_S)] == ["a"]
    with pytest.raises(InvalidRequest, match="the cache has no 'x'; sgld cache list shows what it has"):
        chosen(items, names=["a", "x"])


def test_pruned_is_gone_and_what_is_being_made_stays(overlay: Path, tmp_path: Path) -> None:
    kept, busy = folder_of(overlay), folder_of(overlay_in(tmp_path / "other", tmp_path / "source"))
    left = write(materialized_root() / f"left{TEMPORARY}", {"half": ""})
    learned = write(cache_root() / "learned", {"abc.json": "{}"}) / "abc.json"
    with locked(busy.name):
        done = prune(chosen(cache_items(), takes_all=True))
    assert {item.path for item in done.removed} == {str(kept), str(left), str(learned)}
    assert [item.path for item in done.in_use] == [str(busy)]
    assert [path.exists() for path in (kept, left, learned, busy)] == [False, False, False, True]
    assert prune(done.removed).removed == done.removed  # another process was faster
