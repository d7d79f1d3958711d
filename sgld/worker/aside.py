"""Compiling aside: what a forward tells of its layers goes to a process that compiles them.

The process is told all at once and ends with its work; nothing here waits for it.
"""

import fcntl
import functools
import hashlib
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import msgspec
import torch
from torch import nn

from sgld.models import attention, placement
from sgld.models.placement import plain
from sgld.outcome import Value, outcome_of
from sgld.worker.compiler import CompileJob, CompileResult, TorchState
from sgld.worker.sketch import CannotSketch, sketched

_CLAIMS = "claims"
_MODULES = "modules"
_JOBS = "jobs"
# A few kinds of layers, each for a few sizes and numbers of rows.
_MAX_EXPECTED = 64


class Watch:
    """While the block runs, takes note of the arguments with which modules run.

    :param modules: those that are compiled, each by itself.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._hooks: list[Any] = []
        self._seen: dict[tuple[nn.Module, bytes], TorchState] = {}
        self._problem: CannotSketch | None = None

    def __enter__(self) -> Self:
        self._hooks = [module.register_forward_pre_hook(self._note, with_kwargs=True) for module in self._modules]
        return self

    def __exit__(self, *_exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._problem is not None:
            return
        try:
            self._seen.setdefault((module, sketched(plain((args, kwargs)))), TorchState.now())
        except CannotSketch as error:
            self._problem = error

    def jobs(self) -> list[CompileJob]:
        """What is to be compiled for such a forward; modules that are alike are one.

        :raises CannotSketch: something of it can't be made in another process.
        """
        if self._problem is not None:
            raise self._problem
        modules = {module: sketched(module) for module, _ in self._seen}
        jobs = (CompileJob(modules[module], arguments, state) for (module, arguments), state in self._seen.items())
        return list(dict.fromkeys(jobs))


class CompilerProcess:
    """The process that compiles; it ends with its work, with this process, or when it is closed."""

    def __init__(self, jobs: Sequence[CompileJob]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="sgld-compile-")
        jobs_path, self._result_path = Path(self._folder.name, "jobs"), Path(self._folder.name, "result")
        # What the jobs are made of is found on the path.
        jobs_path.write_bytes(pickle.dumps((sys.path, pickle.dumps((attention.set_ups(), list(jobs))))))
        # Its stdin tells it that this process is gone. In a session of its own, Ctrl-C doesn't reach it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sgld.worker.compiler", str(jobs_path), str(self._result_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def result(self) -> CompileResult | None:
        """What came of it; None while it goes on."""
        status = self._process.poll()
        if status is None:
            return None
        try:
            return msgspec.json.decode(self._result_path.read_bytes(), type=CompileResult)
        except (OSError, msgspec.DecodeError):
            return CompileResult(problem=f"the process that compiles ended with status {status}")

    def close(self) -> None:
        """End the process, if it goes on."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._folder.cleanup()


class Known:
    """Which jobs were compiled, now or before an earlier start: they are in the cache.

    :param folder: of that cache; so who removes it removes this.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder / "sgld" if folder is not None else None
        self._claims: dict[str, IO[str]] = {}
        """Locks of layers that this process has compiled, by what these are."""

    def claim(self, jobs: Iterable[CompileJob]) -> bool:
        """Be the one that compiles these; False while another process on this machine compiles some of their layers.

        For other arguments of a layer the code is mostly the same, so it would compile that, too.

        :raises OSError: the folder can't be used.
        """
        if self._folder is None:
            return True
        folder = self._folder / _CLAIMS
        folder.mkdir(parents=True, exist_ok=True)
        # In order: of two that want the same ones one has the first.
        names = sorted({hashlib.sha256(job.module).hexdigest() for job in jobs} - self._claims.keys())
        with ExitStack() as held:
            claims = {name: held.enter_context((folder / name).open("w")) for name in names}
            try:
                # The kernel takes them back from who dies.
                for claim in claims.values():
                    fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            held.pop_all()
        self._claims |= claims
        return True

    def release(self) -> None:
        """Let others compile."""
        while self._claims:
            self._claims.popitem()[1].close()

    def has(self, job: CompileJob) -> bool:
        return self._folder is not None and self._path(job).exists()

    def add(self, job: CompileJob) -> None:
        if self._folder is not None:
            self._write(self._path(job), pickle.dumps(job))

    def jobs(self) -> list[CompileJob]:
        """Those that were compiled last, as they are now: of other versions is nothing of use."""
        if self._folder is None:
            return []
        ages: dict[Path, float] = {}
        with suppress(OSError):
            for path in (self._folder / _JOBS).iterdir():
                # What begins with a dot is being written.
                if not path.name.startswith("."):
                    with suppress(OSError):
                        ages[path] = path.stat().st_mtime
        paths = sorted(ages, key=ages.__getitem__, reverse=True)
        read = [outcome_of(functools.partial(_read, path)) for path in paths[:_MAX_EXPECTED]]
        return [outcome.value for outcome in read if isinstance(outcome, Value) and outcome.value is not None]

    def modules(self) -> list[str]:
        """What a process has to import that compiles, as far as that is known."""
        with suppress(OSError, UnicodeDecodeError):
            if self._folder is not None:
                return (self._folder / _MODULES).read_text().split()
        return []

    def add_modules(self, names: Sequence[str]) -> None:
        if self._folder is not None and names:
            self._write(self._folder / _MODULES, "\n".join(dict.fromkeys([*self.modules(), *names])).encode())

    def _path(self, job: CompileJob) -> Path:
        assert self._folder is not None
        return self._folder / _JOBS / _name(job)

    def _write(self, path: Path, content: bytes) -> None:
        # A disk may be full: then it is compiled again.
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}")
            part.write_bytes(content)
            part.replace(path)


def _read(path: Path) -> CompileJob | None:
    job = pickle.loads(path.read_bytes())
    return job if isinstance(job, CompileJob) and _name(job) == path.name else None


def _name(job: CompileJob) -> str:
    is_on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpu = torch.cuda.get_device_name() if is_on_gpu else "none"
    versions = (*map(version, ("torch", "diffusers", "transformers")), gpu)
    # Compiled in another way it is something else.
    return hashlib.sha256(pickle.dumps((job, versions, inspect.getsource(placement)))).hexdigest()
