"""What torch's compiler consists of, imported beside calls: that takes seconds of a processor."""

import _imp
import functools
import importlib
import itertools
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from sgld.outcome import outcome_of

COMPILER = ("torch._inductor.compile_fx",)
# Who launches kernels gives the interpreter away with each, and waits so long to have it back: 5 ms by default.
_SWITCH_S = 1e-4
# For each second of imports so many are left to others. So calls take less than twice their time meanwhile.
_REST = 1.0


class Imports:
    """Imports modules in a thread of its own, with rests.

    :param names: of modules; one that can't be imported here is left out.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="imports", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def close(self) -> None:
        """Begin no other; the one that is imported is soon done, without rests."""
        self._is_closed.set()

    def _run(self) -> None:
        rests, interval = _Rests(self._is_closed), sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        # Others may be walking along the list.
        sys.meta_path = [rests, *sys.meta_path]
        try:
            for name in itertools.takewhile(lambda _: not self._is_closed.is_set(), self._names):
                # Some are only for other devices or systems, and say so in ways of their own.
                outcome_of(functools.partial(importlib.import_module, name))
            if "torch._inductor.codecache" in sys.modules and not self._is_closed.is_set():
                outcome_of(_read_keys)
        finally:
            sys.setswitchinterval(interval)
            sys.meta_path = [finder for finder in sys.meta_path if finder is not rests]


def _read_keys() -> None:
    """What all compiled code is looked up by, which torch remembers: hashes of its sources, and of 400 MB of triton."""
    from torch._inductor.async_compile import pre_fork_setup
    from torch._inductor.codecache import torch_key

    pre_fork_setup()  # type: ignore[no-untyped-call]
    torch_key()


class _Rests:
    """A finder of modules that finds none; the thread that made it rests here, as it comes by for each."""

    def __init__(self, is_closed: threading.Event) -> None:
        self._is_closed = is_closed
        self._thread = threading.get_ident()
        self._busy_until_s = time.thread_time()

    def find_spec(
        self, _name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if threading.get_ident() == self._thread:
            # Who looks for a module holds a lock, without which no other thread finds any.
            _imp.release_lock()
            try:
                self._is_closed.wait(_REST * (time.thread_time() - self._busy_until_s))
            finally:
                _imp.acquire_lock()
            self._busy_until_s = time.thread_time()
        return None


def importable(names: Iterable[str]) -> list[str]:
    """Those of the modules of this process that another one can import: generated ones have no place."""
    specs = ((name, getattr(sys.modules[name], "__spec__", None)) for name in names)
    return [name for name, spec in specs if spec is not None and spec.name == name]
