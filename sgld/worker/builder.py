"""Has code compiled in another process, and reads it into this one: part by part, between calls."""

import functools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

from torch import nn

from sgld.outcome import Raised, outcome_of
from sgld.worker.aside import CompilerProcess, Known
from sgld.worker.compiler import CompileJob, CompileResult, run_job
from sgld.worker.imports import COMPILER, Imports
from sgld.worker.sketch import CannotSketch, sketched

logger = logging.getLogger(__name__)
# For each second in which code is read so many are left to calls.
_REST = 2.0
# How often it is looked whether others are done.
LOOK_S = 1.0


class Builder:
    """What is to be compiled, is being compiled, or is being read.

    :param names: of components that are compiled; what others wait for is dropped.
    :param known: what is in the cache of compiled code.
    :param built: told a component and a form of its calls whose code is there.
    :param failed: told a component, forms of its calls that no process could compile, and why.
    :param compiling: entered where this process compiles.
    :param pending: told whether code is on its way.
    """

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        known: Known,
        *,
        built: Callable[[nn.Module, str], None],
        failed: Callable[[nn.Module, Sequence[str], str], None],
        compiling: Callable[[], AbstractContextManager[None]],
        pending: Callable[[bool], None],
        start: Callable[[Sequence[CompileJob]], CompilerProcess],
        imports: Callable[[Sequence[str]], Imports],
        clock: Callable[[], float],
    ) -> None:
        self.num_read = 0
        self._names, self._known, self._clock = names, known, clock
        self._built, self._failed, self._compiling, self._pending = built, failed, compiling, pending
        self._start, self._import = start, imports
        self._queue: dict[str, tuple[nn.Module, list[CompileJob]]] = {}
        """Forms that wait for a process, this one's or another's, and those that one compiles now."""
        self._process: CompilerProcess | None = None
        self._compiled_now: list[str] = []
        """Forms that the process compiles."""
        self._look_again_at = 0.0
        """When another process compiles, that may have the same to do."""
        self._readings: deque[Callable[[], None]] = deque()
        """What is to be done until code of the cache is in this process, a second or two each."""
        self._read_again_at = 0.0
        self._read: set[CompileJob] = set()
        self._to_import: Sequence[str] = known.modules() or COMPILER
        self._imports: Imports | None = None
        self._is_told = False

    @property
    def is_pending(self) -> bool:
        """Whether code is on its way."""
        return bool(self._queue or self._readings)

    def submit(self, module: nn.Module, form: str, jobs: list[CompileJob]) -> None:
        """Have the layers compiled that a form of a component's calls runs."""
        self._queue[form] = module, jobs
        if self._process is None:
            self._begin()
        else:
            self._build_known()
        self._tell()

    def look(self) -> None:
        """Between two calls: see whether the process is done, and read a part of what it compiled."""
        self._read_next()
        if self._process is None:
            if self._queue and self._clock() >= self._look_again_at:
                self._begin()
        elif (result := self._process.result()) is not None:
            self._process.close()
            self._process = None
            self._end(result)
            self._known.release()
            if self._queue:
                self._begin()
        self._tell()

    def expect(self, layers: Iterable[nn.Module]) -> None:
        """Read what was compiled for such layers before an earlier start, until calls ask for it."""
        if known := self._known.jobs():
            self._has_imported()
            sketches = set(map(_sketch, layers))
            self._readings.extend(functools.partial(self._read_job, job) for job in known if job.module in sketches)

    def give_up(self) -> list[tuple[str, nn.Module]] | None:
        """End the process, and forget what waits for it; returns that, None if there is no process."""
        if self._process is None:
            return None
        self._process.close()
        self._process, self._compiled_now = None, []
        self._known.release()
        dropped = [(form, module) for form, (module, _) in self._queue.items()]
        self._queue.clear()
        self._tell()
        return dropped

    def close(self) -> None:
        """End the process, if there is one."""
        if self._imports is not None:
            self._imports.close()
        if self._process is not None:
            self._process.close()
        self._known.release()

    def _begin(self) -> None:
        """Have all that waits compiled, but for what is in the cache. What others compile is looked at again."""
        # Meanwhile a component may have left: its calls compile it, or nothing does.
        self._queue = {form: entry for form, entry in self._queue.items() if entry[0] in self._names}
        self._compiled_now = list(self._queue)
        try:
            self._compiled_now = [form for form, (_, jobs) in self._queue.items() if self._known.claim(jobs)]
            self._build_known()
            if self._compiled_now:
                self._start_process()
                return
        except OSError as error:
            self._end(CompileResult(problem=str(error)))
        self._known.release()
        self._compiled_now = []
        self._look_again_at = self._clock() + LOOK_S

    def _start_process(self) -> None:
        now = [self._queue[form] for form in self._compiled_now]
        jobs = [job for _, of_form in now for job in of_form]
        logger.info("compiling %s in a process of its own", ", ".join(self._names[module] for module, _ in now))
        self._process = self._start(list(dict.fromkeys(jobs)))
        self._has_imported()

    def _build_known(self) -> None:
        for form, (module, jobs) in list(self._queue.items()):
            if all(map(self._known.has, jobs)):
                del self._queue[form]
                self._build(module, form, jobs)
        self._compiled_now = [form for form in self._compiled_now if form in self._queue]

    def _end(self, result: CompileResult) -> None:
        forms, self._compiled_now = self._compiled_now, []
        done = {form: entry for form in forms if (entry := self._queue.pop(form))[0] in self._names}
        if result.problem is not None:
            for module in dict.fromkeys(module for module, _ in done.values()):
                self._failed(module, [form for form, (of, _) in done.items() if of is module], result.problem)
            return
        logger.info("compiled in %.0f s", result.elapsed_s)
        self._known.add_modules(result.imported)
        self._to_import = result.imported
        for form, (module, jobs) in done.items():
            for job in jobs:
                self._known.add(job)
            self._build(module, form, jobs)

    def _build(self, module: nn.Module, form: str, jobs: Sequence[CompileJob]) -> None:
        """The code of a form is in the cache: it is read part by part between calls, then the next one takes it."""
        self._readings.extend(functools.partial(self._read_job, job) for job in jobs)
        self._readings.append(functools.partial(self._built, module, form))

    def _read_next(self) -> None:
        """Read a part, if the last one is long enough ago.

        All at once would hold up everybody: for seconds, as torch traces each layer again, and does that in Python.
        Another thread can't do it meanwhile: torch would tell the models that run that they are being traced, and set
        its generators of random numbers back to where they were when it began.
        """
        if not self._readings or self._clock() < self._read_again_at or not self._has_imported():
            return
        start_s = self._clock()
        self._readings.popleft()()
        end_s = self._clock()
        self._read_again_at = end_s + _REST * (end_s - start_s)

    def _has_imported(self) -> bool:
        """Whether what reading takes is imported; that begins here."""
        if self._to_import and (self._imports is None or self._imports.is_done):
            self._imports, self._to_import = self._import(self._to_import), ()
        return self._imports is None or self._imports.is_done

    def _read_job(self, job: CompileJob) -> None:
        """What is compiled for one module is there for all that are like it."""
        if job in self._read:
            return
        self._read.add(job)
        with self._compiling():
            read = outcome_of(functools.partial(run_job, job))
        if isinstance(read, Raised):
            # Memory may be short: then the call that comes reads it itself.
            logger.debug("not read in advance: %r", read.error)
        self.num_read += 1

    def _tell(self) -> None:
        """Tell whether code is on its way, if that is news."""
        if self.is_pending != self._is_told:
            self._is_told = self.is_pending
            self._pending(self.is_pending)


def _sketch(part: nn.Module) -> bytes | None:
    try:
        return sketched(part)
    except CannotSketch:
        return None
