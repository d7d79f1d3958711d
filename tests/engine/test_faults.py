"""Faults of real rank processes, which serve a tiny pipeline from a folder; those of scripts are spawned by them."""

import json
import multiprocessing
import os
import select
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

import anyio
import msgspec
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from pipelines import build

from engine.preloaded import preloaded_rank
from engine.streams import (
    TIMEOUT_S,
    completed,
    difference,
    events_of,
    events_with_fault,
    is_idle,
    leave_at,
    names,
    params_of,
    plain,
    until,
)
from sgld.config import EngineConfig
from sgld.engine.engine import Engine
from sgld.errors import ModelError, ModelLost
from sgld.events import AnyEvent, Completed, Failed, Progress, Restarted
from sgld.sampling_params import SamplingParams

pytestmark = pytest.mark.long
T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    """A pipeline, the folder where it was saved, and arguments that suit it."""

    pipeline: Any
    folder: Path
    kwargs: dict[str, Any]

    def params(self, **choices: Any) -> SamplingParams:
        return params_of(self.kwargs, **choices)

    def config(self, folder: Path | None = None) -> EngineConfig:
        return EngineConfig(model_path=str(folder or self.folder), device="cpu", num_cpu_threads=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    pipeline, kwargs = build("pixart")
    folder = tmp_path_factory.mktemp("pixart")
    pipeline.save_pretrained(folder)
    return Model(pipeline, folder, kwargs)


@dataclass(frozen=True)
class Served:
    """An engine whose rank is ready, on an event loop in a thread: starting one takes seconds, so tests share it."""

    portal: BlockingPortal
    engine: Engine

    def run(self, body: Callable[[Engine], Awaitable[T]]) -> T:
        return self.portal.call(body, self.engine)


@pytest.fixture(scope="module")
def served(model: Model) -> Iterator[Served]:
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(Engine(model.config(), rank_factory=preloaded_rank)) as engine,
    ):
        portal.call(engine.ready)
        # From here on the engine knows what a forward takes.
        portal.call(completed, engine, model.params())
        yield Served(portal, engine)


def rank_pids() -> list[int]:
    return [
        process.pid for process in multiprocessing.active_children() if process.name == "sgld-rank-0" and process.pid
    ]


def signal_rank(number: signal.Signals) -> None:
    [pid] = rank_pids()
    os.kill(pid, number)


def has_ended(pid: int, timeout_s: float = TIMEOUT_S) -> bool:
    """Wait for the end of a process, which need not be a child."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
    finally:
        os.close(fd)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_request_runs_again_on_a_new_rank(served: Served, model: Model, number: signal.Signals) -> None:
    params = model.params(num_inference_steps=40, seed=3)

    async def body(engine: Engine) -> None:
        before = rank_pids()
        events = await events_with_fault(engine, params, lambda: signal_rank(number))
        [restarted] = [event for event in events if isinstance(event, Restarted)]
        assert restarted.attempt == 2
        after = events[events.index(restarted) + 1 :]
        assert names(after)[0] == "Started"
        assert isinstance(after[-1], Completed)
        assert difference(after[-1].frames, plain(model.pipeline, params)) == 0
        assert set(rank_pids()).isdisjoint(before)

    served.run(body)


def test_request_that_costs_two_ranks_fails_and_another_completes(served: Served, model: Model) -> None:
    """The bad request runs alone: it has less to do. The rank is stopped to see that, then killed."""
    good = model.params(num_inference_steps=60, height=64, width=64, seed=3)
    bad = model.params(num_inference_steps=20)
    ends: dict[str, list[AnyEvent]] = {}

    async def run_good(engine: Engine) -> None:
        ends["good"] = await events_of(engine, good)

    async def run_bad(engine: Engine) -> None:
        ends["bad"] = []
        async for event in engine.generate(bad):
            ends["bad"].append(event)
            if isinstance(event, Progress):
                signal_rank(signal.SIGSTOP)
                await anyio.wait_all_tasks_blocked()
                running = [name for batch in engine._replicas[0].running.values() for name in batch.request_ids]
                is_alone = [request_id.partition("-")[0] for request_id in running] == [event.request_id]
                signal_rank(signal.SIGKILL if is_alone else signal.SIGCONT)
                if is_alone:
                    await anyio.wait_all_tasks_blocked()

    async def body(engine: Engine) -> None:
        with anyio.fail_after(TIMEOUT_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run_good, engine)
                tasks.start_soon(run_bad, engine)
        failed, done = ends["bad"][-1], ends["good"][-1]
        assert isinstance(failed, Failed)
        assert failed.code == "rank_lost"
        assert "SIGKILL" in failed.message
        assert names(ends["bad"]).count("Restarted") == 1
        assert isinstance(done, Completed)
        assert difference(done.frames, plain(model.pipeline, good)) <= 1
        assert is_idle(engine)

    served.run(body)


def test_request_left_while_its_rank_starts_again_is_gone(served: Served, model: Model) -> None:
    async def body(engine: Engine) -> None:
        async with aclosing(engine.generate(model.params(num_inference_steps=40))) as events:
            async for event in events:
                if isinstance(event, Progress):
                    signal_rank(signal.SIGKILL)
                if isinstance(event, Restarted):
                    break
        assert names(await leave_at(engine, model.params(seed=4), 1)) == ["Queued"]
        assert is_idle(engine)
        following = model.params(seed=5)
        assert difference((await completed(engine, following)).frames, plain(model.pipeline, following)) == 0

    served.run(body)


def truncate_weights(folder: Path) -> None:
    [weights] = (folder / "transformer").glob("*.safetensors")
    os.truncate(weights, 1000)


def name_unknown_class(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "NoSuchPipeline"}))


@pytest.mark.parametrize("spoil", [truncate_weights, name_unknown_class])
async def test_model_that_cannot_be_loaded_is_one_line_for_all(
    model: Model, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model.folder, folder)
    spoil(folder)
    with anyio.fail_after(TIMEOUT_S):
        async with Engine(model.config(folder), rank_factory=preloaded_rank) as engine:
            with pytest.raises(ModelError) as before:
                await events_of(engine, model.params())
            with pytest.raises(ModelError) as ready:
                await engine.ready()
            with pytest.raises(ModelError) as after:
                await events_of(engine, model.params())
    for raised in (before, ready, after):
        assert str(folder) in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1
        assert "process died" not in str(raised.value)


async def test_rank_that_dies_while_it_loads_is_no_fault_of_the_model(model: Model) -> None:
    others = set(rank_pids())
    with anyio.fail_after(TIMEOUT_S):
        async with Engine(model.config(), rank_factory=preloaded_rank) as engine:
            await until(lambda: set(rank_pids()) - others)
            [pid] = set(rank_pids()) - others
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(ModelLost, match="can't be loaded: the rank process died"):
                await engine.ready()


def left_in_shared_memory() -> set[str]:
    """Files that no process uses: those of others that live come and go. A semaphore is mapped by its earlier name."""
    used: set[int] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            used.update(int(line.split()[4]) for line in maps.read_text().splitlines() if "/dev/shm/" in line)
    with os.scandir("/dev/shm") as entries:
        return {entry.name for entry in entries if entry.inode() not in used}


def has_process(pid: int) -> bool:
    """Whether there is a process or a zombie."""
    return Path(f"/proc/{pid}").exists()


def open_fds() -> dict[str, str]:
    found = {}
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found[fd.name] = str(fd.readlink())
        except FileNotFoundError:
            continue
    return found


async def test_nothing_is_left_of_an_engine(model: Model) -> None:
    """Closed while it starts its rank, while that loads, and while a request runs."""
    resource_tracker.ensure_running()
    before = left_in_shared_memory()
    fds, others = len(open_fds()), set(rank_pids())
    pids: set[int] = set()

    def new_ranks() -> set[int]:
        return set(rank_pids()) - others

    async with Engine(model.config()):
        await anyio.lowlevel.checkpoint()
    assert len(open_fds()) == fds
    async with Engine(model.config()):
        await until(new_ranks)
        pids |= new_ranks()
    assert len(open_fds()) == fds
    async with Engine(model.config()) as engine:
        assert names(await leave_at(engine, model.params(num_inference_steps=500), 3))[-1] == "Progress"
        pids |= new_ranks()
    assert len(open_fds()) == fds, open_fds()
    assert len(pids) == 2
    assert not any(map(has_process, pids))
    assert left_in_shared_memory() <= before


SCRIPT = """
import multiprocessing, sys
import anyio, msgspec
from sgld.config import EngineConfig
from sgld.engine.engine import Engine
from sgld.events import Progress
from sgld.sampling_params import SamplingParams

print("imported", flush=True)

async def main():
    config, params = msgspec.json.decode(sys.argv[1]), msgspec.json.decode(sys.argv[2])
    async with Engine(msgspec.convert(config, EngineConfig)) as engine:
        async for event in engine.generate(msgspec.convert(params, SamplingParams)):
            if isinstance(event, Progress) and event.step > 1:
                [rank] = multiprocessing.active_children()
                print("rank", rank.pid, flush=True)
                await anyio.sleep_forever()

GUARD
    anyio.run(main)
"""


def start_script(folder: Path, model: Model, guard: str) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).replace("GUARD", guard))
    arguments = [as_json(model.config()), as_json(model.params(num_inference_steps=900))]
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def as_json(struct: msgspec.Struct) -> str:
    return msgspec.json.encode(struct).decode()


def rank_of(front: subprocess.Popen[str]) -> int:
    """The rank's pid, which a script says when a request runs."""
    assert front.stdout is not None
    for line in front.stdout:
        if line.startswith("rank "):
            return int(line.split()[1])
    raise AssertionError(f"no rank: {front.communicate()[1]}")


GUARD = 'if __name__ == "__main__":'


def test_killed_front_leaves_no_rank(model: Model, tmp_path: Path) -> None:
    front = start_script(tmp_path, model, GUARD)
    rank = rank_of(front)
    front.kill()
    front.communicate(timeout=TIMEOUT_S)
    assert has_ended(rank)


def test_interrupt_ends_front_and_rank_and_says_nothing_of_the_rank(model: Model, tmp_path: Path) -> None:
    before = left_in_shared_memory()
    front = start_script(tmp_path, model, GUARD)
    rank = rank_of(front)
    os.killpg(front.pid, signal.SIGINT)
    _, err = front.communicate(timeout=TIMEOUT_S)
    assert front.returncode != 0
    assert has_ended(rank)
    assert err.splitlines()[-1] == "KeyboardInterrupt"
    assert "spawn" not in err
    assert "leaked" not in err
    assert left_in_shared_memory() <= before


def test_script_without_a_guard_gets_one_clear_line(model: Model, tmp_path: Path) -> None:
    front = start_script(tmp_path, model, "if True:")
    out, err = front.communicate(timeout=TIMEOUT_S)
    assert front.returncode != 0
    # Once as the script, once by its rank.
    assert out.split() == ["imported", "imported"]
    lines = [line for line in err.splitlines() if "if __name__ == '__main__':" in line]
    assert lines == ["sgld: a script that starts an engine needs `if __name__ == '__main__':` around its main part"]
