import subprocess
import sys
from pathlib import Path

import pytest
import stuck

BENCH = Path(stuck.__file__).parent
_PARENT = """
import stuck, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()"], stdin=subprocess.PIPE)
sys.stdin.readline()
child.communicate(b"x")
print("child", child.returncode, flush=True)
"""


def test_processes_write_their_stacks_and_those_that_would_not_survive_it_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stuck, "_WRITE_S", 0.0)
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT],
        cwd=BENCH,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        stuck.show_stacks(process.pid)
        said, stacks = process.communicate("go on\n")
    assert said == "child 0\n"
    assert 'File "<string>", line 4' in stacks
