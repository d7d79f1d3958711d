"""How processes of ranks are started."""

import logging
import multiprocessing
import os
import subprocess
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from sgld.config import EngineConfig
from sgld.engine import replica
from sgld.engine.replica import _end, _first_death, _inherited, rank_process
from sgld.errors import RankLost
from sgld.ipc.channel import channel_pair
from sgld.logs import set_up_logs
from sgld.parallel import ParallelConfig
from sgld.worker.main import rank_environment


def environment() -> list[str]:
    """What a new process gets."""
    return subprocess.run(["env", "-0"], stdout=subprocess.PIPE, check=True).stdout.decode().split("\0")


def test_ranks_get_an_environment_that_this_process_does_not_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in rank_environment(EngineConfig()):
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv("TQDM_DISABLE", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    before = environment()
    with _inherited(rank_environment(EngineConfig(parallel=ParallelConfig(dp_size=2)), replica=1)):
        during = environment()
    assert {"OMP_WAIT_POLICY=PASSIVE", "TQDM_DISABLE=0", "CUDA_VISIBLE_DEVICES=5"} <= set(during)
    assert sorted(environment()) == sorted(before)


class Ended:
    """Stands for a process that has ended so."""

    sentinel = 0

    def __init__(self, exitcode: int | None) -> None:
        self.exitcode = exitcode

    def join(self, timeout: float | None = None) -> None:
        pass


class Stuck(Ended):
    """In the driver, where no signal reaches it."""

    def __init__(self, sentinel: int) -> None:
        super().__init__(None)
        self.sentinel = sentinel

    def kill(self) -> None:
        pass

    def close(self) -> None:
        raise ValueError("it is still running")


async def test_process_that_no_signal_ends_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others of its engine go on, and its replica is started again."""
    monkeypatch.setattr(replica, "EXIT_GRACE_S", 0.0)
    front, rank_end = channel_pair()
    own, other = os.pipe()
    await _end(front, [Stuck(own)])
    rank_end.close()
    os.close(own)
    os.close(other)


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
    folder = str(tmp_path / "cache" / "torch_compile_cache")
    assert ("TORCHINDUCTOR_CACHE_DIR", None, folder) in rank_environment(EngineConfig())
    (tmp_path / "file").touch()
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path / "file"))
    assert "TORCHINDUCTOR_CACHE_DIR" not in {variable.name for variable in rank_environment(EngineConfig())}


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


def show_and_leave(folder: Path, both: Barrier) -> None:
    """A rank that writes which GPUs it could see when its process began, and leaves with the other one."""
    variables = Path("/proc/self/environ").read_text().split("\0")
    seen = next(variable for variable in variables if variable.startswith("CUDA_VISIBLE_DEVICES"))
    (folder / multiprocessing.current_process().name).write_text(seen)
    both.wait(30)
    os._exit(0)


async def test_no_code_of_a_rank_sees_gpus_of_another_replica(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not even what a script imports before the rank begins."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    config = EngineConfig(parallel=ParallelConfig(dp_size=2, num_gpus=4))
    both = multiprocessing.get_context("spawn").Barrier(2)
    with anyio.fail_after(30):
        async with rank_process(config, 1, set_up=partial(show_and_leave, tmp_path, both)) as rank:
            with pytest.raises(RankLost):
                await rank.receive()
    seen = {path.name: path.read_text() for path in tmp_path.iterdir()}  # noqa: ASYNC240
    assert seen == {f"sgld-rank-{n}-of-replica-1": "CUDA_VISIBLE_DEVICES=6,7" for n in range(2)}
