"""How processes of ranks are started."""

import subprocess
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
