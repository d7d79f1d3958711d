"""What processes do that should be done: they write the stacks of their threads to stderr.

One that imports this does so for SIGUSR1.
"""

import faulthandler
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

faulthandler.register(signal.SIGUSR1, file=2)
# To write them takes a moment.
_WRITE_S = 1.0


def show_stacks(pid: int) -> None:
    """Have a process and all below it write their stacks, as far as they do that for SIGUSR1; others go on as well."""
    for one in (pid, *_below(pid)):
        with suppress(ProcessLookupError, FileNotFoundError):
            if _catches(one, signal.SIGUSR1):
                os.kill(one, signal.SIGUSR1)
    time.sleep(_WRITE_S)


def _below(pid: int) -> Iterator[int]:
    with suppress(FileNotFoundError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                yield child
                yield from _below(child)


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process handles a signal that would end it otherwise."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(mask >> (number - 1) & 1)
