"""Random requests against a real rank that is killed twice: bench/soak.py, as anybody would run it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
SOAK = Path(__file__).parents[2] / "bench" / "soak.py"


@pytest.mark.timeout(600)
def test_random_requests_end_once_with_the_pictures_that_they_give_alone() -> None:
    command = [sys.executable, str(SOAK), "--num-requests", "200", "--no-write"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "problems: []" in done.stdout
