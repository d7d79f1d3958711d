import subprocess
import sys

import pytest


def test_what_a_rank_prints_is_no_result() -> None:
    script = "import os; from sgld.worker.main import say_on_stderr; say_on_stderr(); print('a'); os.system('echo b')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, sorted(done.stderr.split())) == ("", ["a", "b"])


def test_stacks_of_a_rank_are_written_when_it_is_asked_for_them() -> None:
    script = (
        "import os, signal; from sgld.worker import main;"
        "main._leave_with_parent = lambda: None; main._begin();"
        "os.kill(os.getpid(), signal.SIGUSR1); print('goes on')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 'File "<string>", line 1' in done.stderr
    assert "goes on" in done.stderr


@pytest.mark.parametrize(("kind", "niceness"), [("cpu", "5"), ("cuda", "0")])
def test_only_a_rank_that_computes_on_the_cores_gives_way_to_others(kind: str, niceness: str) -> None:
    script = (
        "import os, sys; from types import SimpleNamespace as Of; from sgld.config import EngineConfig;"
        "from sgld.ipc.seats import ALONE; from sgld.worker import main; before = os.nice(0);"
        f"model = Of(device=Of(type={kind!r})); sys.modules['sgld.models.load'] = Of(load=lambda *given: model);"
        "main._load(EngineConfig(model_path='m'), 5, ALONE); print(os.nice(0) - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == niceness
