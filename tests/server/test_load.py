"""A busy server with many who watch: bench/load.py, for half a minute."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
BENCH = Path(__file__).parents[2] / "bench" / "load.py"


def test_all_who_watch_hear_everything_in_order_while_some_do_not_listen() -> None:
    """The limits are for a machine that does nothing else; here they only mustn't be out of hand."""
    flags = ["--seconds", "30", "--max-p99-ms", "10000", "--max-growth-mib", "32"]

    done = subprocess.run(
        [sys.executable, str(BENCH), *flags, "--no-write"], capture_output=True, text=True, timeout=250
    )

    assert done.returncode == 0, done.stdout + done.stderr
