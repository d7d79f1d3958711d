"""Small files that several processes change: each adds what it learned to what the others wrote."""

import fcntl
from collections.abc import Callable
from pathlib import Path

from sgld.media.files import write_atomically


def change(path: Path, changed: Callable[[bytes], bytes]) -> None:
    """Put what is made of a file's content in its place, atomically; nobody else changes it meanwhile.

    :param changed: given nothing where there is no file.
    :raises OSError: it can't be read or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".lock").open("w") as lock:
        # Without a deadline: it is held for the time of a small write, and the kernel takes it back from who dies.
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_atomically(path, changed(path.read_bytes() if path.exists() else b""))
