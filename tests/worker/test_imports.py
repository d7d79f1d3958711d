import _imp
import sys
import threading
from pathlib import Path

import pytest

from sgld.worker.imports import Imports, _Rests, importable


def imported(names: list[str]) -> Imports:
    """Those, when they are there."""
    imports = Imports(names)
    for thread in threading.enumerate():
        if thread.name == "imports":
            thread.join(10)
    return imports


def test_modules_are_imported_and_nothing_else_is_left_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one_that_is.py").write_text("import one_beside_it")
    (tmp_path / "one_beside_it.py").write_text("import threading; thread = threading.current_thread().name")
    (tmp_path / "one_that_fails.py").write_text("raise OSError('no such device')")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path), sys.getswitchinterval()
    assert imported(["one_that_fails", "one_that_is_not", "one_that_is"]).is_done
    assert sys.modules["one_beside_it"].thread == "imports"
    assert "one_that_fails" not in sys.modules
    assert (list(sys.meta_path), sys.getswitchinterval()) == before


def test_others_find_modules_while_the_thread_rests() -> None:
    held: list[bool] = []

    class Never(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            held.append(_imp.lock_held())
            return False

    rests = _Rests(Never())
    _imp.acquire_lock()
    rests.find_spec("anything")
    held.append(_imp.lock_held())
    _imp.release_lock()
    assert held == [False, True]


def test_what_is_closed_begins_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one_that_waits.py").write_text("import builtins; builtins.begun.set(); builtins.go_on.wait(10)")
    (tmp_path / "one_after_it.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    begun, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr("builtins.begun", begun, raising=False)
    monkeypatch.setattr("builtins.go_on", go_on, raising=False)
    imports = Imports(["one_that_waits", "one_after_it"])
    assert begun.wait(10)
    assert not imports.is_done
    imports.close()
    go_on.set()
    imported([])
    assert imports.is_done
    assert "one_after_it" not in sys.modules


def test_generated_modules_cannot_be_imported_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "one_of_now", type(sys)("one_of_now"))
    assert importable(["json", "one_of_now"]) == ["json"]
