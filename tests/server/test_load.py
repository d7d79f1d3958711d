"""A busy server with many who watch: bench/load.py, for some seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
BENCH = Path(__file__).parents[2] / "bench" / "load.py"


def test_all_who_watch_hear_everything_in_order_while_some_do_not_listen() -> None:
    """The delay is for a machine that does nothing else; here it only mustn't be out of hand, as what processes grow by
    in their first seconds.

    Slow readers don't read for 8 seconds, then for one.
    """
    flags = ["--seconds", "10", "--num-subscribers", "200", "--num-generations", "16"]
    flags += ["--max-p99-ms", "10000", "--max-growth-mib", "100"]

    done = subprocess.run(
        [sys.executable, str(BENCH), *flags, "--no-write"], capture_output=True, text=True, timeout=250
    )

    assert done.returncode == 0, done.stdout + done.stderr
