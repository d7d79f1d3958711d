"""How processes of ranks are started."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from sgld.engine.replica import _started
from sgld.worker.main import rank_environment


def environment() -> list[str]:
    """What a new process gets."""
    return subprocess.run(["env", "-0"], stdout=subprocess.PIPE, check=True).stdout.decode().split("\0")


class Process:
    """Stands for a process: sees the environment that it would get."""

    def __init__(self) -> None:
        self.environment: list[str] = []

    def start(self) -> None:
        self.environment = environment()


def test_ranks_get_an_environment_that_this_process_does_not_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in rank_environment():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TQDM_DISABLE", "0")
    before, process, processes = environment(), Process(), list[Any]()
    _started(processes, process)
    assert processes == [process]
    assert {"OMP_WAIT_POLICY=PASSIVE", "TQDM_DISABLE=0"} <= set(process.environment)
    assert sorted(environment()) == sorted(before)


def test_where_no_cache_can_be_ranks_have_that_of_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path / "cache"))
    assert rank_environment()["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache" / "torch_compile_cache")
    (tmp_path / "file").touch()
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path / "file"))
    assert "TORCHINDUCTOR_CACHE_DIR" not in rank_environment()
