"""How processes of ranks are started."""

import logging
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from sgld.config import EngineConfig
from sgld.engine.replica import _first_death, _started, rank_process
from sgld.errors import RankLost
from sgld.logs import set_up_logs
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


class Ended:
    """Stands for a process that has ended so."""

    sentinel = 0

    def __init__(self, exitcode: int | None) -> None:
        self.exitcode = exitcode

    def join(self, timeout: float | None = None) -> None:
        pass


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        ([1, -9, 0], "rank 1: killed by SIGKILL"),
        ([1, None, None], "rank 0: exit code 1"),
        ([None, None], None),
        ([-11], "killed by SIGSEGV"),
    ],
)
def test_who_was_killed_is_named_rather_than_who_left_for_it(codes: list[int | None], cause: str | None) -> None:
    processes: Any = [Ended(code) for code in codes]
    assert _first_death(processes, 0) == cause


def test_where_no_cache_can_be_ranks_have_that_of_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path / "cache"))
    assert rank_environment()["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache" / "torch_compile_cache")
    (tmp_path / "file").touch()
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path / "file"))
    assert "TORCHINDUCTOR_CACHE_DIR" not in rank_environment()


def say_and_leave(path: Path) -> None:
    """A rank that logs and leaves, before it imports torch."""
    with path.open("w") as file:
        os.dup2(file.fileno(), 2)
    set_up_logs("info", "json")
    logging.getLogger("sgld.worker").info("a rank says %s", "this")
    os._exit(0)


async def test_ranks_log_as_they_are_told(tmp_path: Path) -> None:
    with anyio.fail_after(30):
        async with rank_process(EngineConfig(), set_up=partial(say_and_leave, tmp_path / "log")) as rank:
            with pytest.raises(RankLost):
                await rank.receive()
    line = msgspec.json.decode((tmp_path / "log").read_bytes(), type=dict[str, Any])
    assert (line["level"], line["message"]) == ("info", "a rank says this")
