"""Which calls run compiled code: no call waits for a compiler, which works in a process of its own.

A call whose form isn't known runs as it always did, and what its layers were given goes to that process. When they are
compiled, the next call of that form takes their code from the cache, which is a matter of seconds.
"""

import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, assert_never

import torch
from torch import nn

from sgld.models.placement import compile_module, regions
from sgld.outcome import Raised, outcome_of
from sgld.worker.aside import CompilerProcess, Known, Watch
from sgld.worker.compiler import CompileJob, CompileResult, run_job
from sgld.worker.imports import COMPILER, Imports
from sgld.worker.invocation import Invocation
from sgld.worker.recent import Recent
from sgld.worker.sketch import CannotSketch, sketched

logger = logging.getLogger(__name__)
Mode = Literal["eager", "watched", "tried", "taken", "compiled"]
"""How a call runs. `watched`: eagerly, to see what is to be compiled. `tried`: with the code that is there, if that
fits. `taken`: with code that was just read from the cache; what isn't there yet is read now."""
State = Literal["pending", "built", "ready", "missed", "refused"]
"""Of a form. `pending`: it is being compiled, or its code is read; `built`: that is done; `ready`: a call has run so;
`missed`: the code that is there isn't for it; `refused`: it can't be compiled."""
IRREGULAR: frozenset[Mode] = frozenset({"watched", "tried", "taken"})
COMPILED: frozenset[Mode] = frozenset({"tried", "taken", "compiled"})
_NEXT_MODE: dict[State, Mode] = {
    "pending": "eager",
    "built": "taken",
    "ready": "compiled",
    "missed": "watched",
    "refused": "eager",
}
# A pause between two steps that is longer than this isn't one of computing.
_MAX_STEP_S = 1.0
_MAX_PROBLEM_CHARS = 300
# For each second in which code is read so many are left to calls.
_REST = 2.0
# How often it is looked whether others are done.
LOOK_S = 1.0


class Swap:
    """Code that is compiled aside, for the components of one rank.

    :param names: the components that are compiled, by module.
    :param after_s: so long a component computes before it is worth compiling.
    :param inline: told which component its calls compile themselves, as no other process can; None: they don't.
    :param note: told of a component what came of it.
    :param changed: told which component runs other code from now on.
    :param compiling: entered where this process compiles.
    :param pending: told whether code is on its way that later calls will run.
    :param cache: the folder of compiled code.
    """

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        *,
        after_s: float = 0.0,
        inline: Callable[[nn.Module], None] | None = None,
        note: Callable[[str, str], None] = lambda component, note: None,
        changed: Callable[[nn.Module], None] = lambda module: None,
        compiling: Callable[[], AbstractContextManager[None]] = nullcontext,
        pending: Callable[[bool], None] = lambda is_pending: None,
        cache: Path | None = None,
        compiles: Callable[[nn.Module], None] = compile_module,
        start: Callable[[Sequence[CompileJob]], CompilerProcess] = CompilerProcess,
        imports: Callable[[Sequence[str]], Imports] = Imports,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_irregular = 0
        """Calls that took longer than the next ones will."""
        self._names = dict(names)
        # A step cache has other modules in the place of these now and then.
        self._regions = {module: regions(module) for module in names}
        self._after_s, self._clock = after_s, clock
        self._note, self._changed, self._compiling, self._start = note, changed, compiling, start
        self._inline, self._compiles, self._pending, self._import = inline, compiles, pending, imports
        self._said: set[tuple[nn.Module, str]] = set()
        self._known = Known(cache)
        self._states: Recent[State] = Recent()
        self._patched: Recent[nn.Module] = Recent()
        """Of forms that were refused while adapters were in their layers: one of these layers."""
        self._swapped: set[nn.Module] = set()
        self._busy_s = dict.fromkeys(names, 0.0)
        self._last_s = dict.fromkeys(names, clock())
        self._queue: dict[str, tuple[nn.Module, list[CompileJob]]] = {}
        """Forms that wait for a process, this one's or another's, and those that one compiles now."""
        self._readings: deque[Callable[[], None]] = deque()
        """What is to be done until code of the cache is in this process, a second or two each."""
        self._read_again_at = 0.0
        self._read: set[CompileJob] = set()
        self._to_import: Sequence[str] = self._known.modules() or COMPILER
        self._imports: Imports | None = None
        self._look_again_at = 0.0
        """When another process compiles, that may have the same to do."""
        self._is_told = False
        self._process: CompilerProcess | None = None
        self._compiled_now: list[str] = []
        """Forms that the process compiles."""

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._names

    @property
    def is_pending(self) -> bool:
        """Whether code is on its way that later calls will run."""
        return bool(self._queue or self._readings)

    def has_code(self, module: nn.Module) -> bool:
        """Whether some of its calls run compiled."""
        return module in self._swapped

    def mode(self, invocation: Invocation) -> Mode:
        """How calls of this form run now."""
        module, form = invocation.module, self._form(invocation)
        if (state := self._states.recall(form)) is not None and not self._is_outdated(form):
            return _NEXT_MODE[state]
        if module in self._swapped:
            return "tried"
        now = self._clock()
        self._busy_s[module] += min(now - self._last_s[module], _MAX_STEP_S)
        self._last_s[module] = now
        return "watched" if self._busy_s[module] >= self._after_s else "eager"

    def run(self, invocation: Invocation, mode: Mode, forward: Callable[[], Any]) -> Any:
        """Run a call as `mode` says.

        :raises RuntimeError: `missed` tells whether it is because there is no code for it.
        """
        # Before the forward: models take things out of the dicts that they are given.
        module, form = invocation.module, self._form(invocation)
        if mode == "watched":
            with self._stance(module, mode), Watch(self._regions[module]) as watch:
                result = forward()
            self.num_irregular += 1
            self._submit(module, form, watch)
            return result
        with self._stance(module, mode):
            result = forward()
        if mode in ("tried", "taken"):
            self._states[form] = "ready"
        return result

    def missed(self, invocation: Invocation, error: BaseException) -> bool:
        """Whether a call failed because there is no code for it; then it runs otherwise from now on."""
        if invocation.module not in self._swapped or "fail_on_recompile" not in str(error):
            return False
        self.num_irregular += 1
        self._states[self._form(invocation)] = "missed"
        return True

    def make_room(self) -> bool:
        """Memory is short: end the process, which has some of the device's, until more was computed; false: none is."""
        if self._process is None:
            return False
        self._process.close()
        self._process, self._compiled_now = None, []
        self._known.release()
        for form, (module, _) in self._queue.items():
            self._states.pop(form, None)
            self._busy_s[module] = 0.0
        self._queue.clear()
        self._tell()
        return True

    def close(self) -> None:
        """End the process, if there is one."""
        if self._imports is not None:
            self._imports.close()
        if self._process is not None:
            self._process.close()
        self._known.release()

    def _stance(self, module: nn.Module, mode: Mode) -> AbstractContextManager[Any]:
        """What torch does where code is missing while a call runs."""
        match mode:
            case "eager" | "watched":
                is_plain = module not in self._swapped
                return nullcontext() if is_plain else _stance("force_eager")
            case "tried" | "compiled":
                return _stance("fail_on_recompile")
            case "taken":
                return self._compiling()
            case unknown:
                assert_never(unknown)

    def _form(self, invocation: Invocation) -> str:
        return f"{self._names[invocation.module]}.{invocation.form}"

    def _submit(self, module: nn.Module, form: str, watch: Watch) -> None:
        try:
            jobs = watch.jobs()
        except CannotSketch as error:
            self._refuse(module, [form], str(error))
            return
        self._states[form] = "pending"
        self._queue[form] = module, jobs
        if self._process is None:
            self._begin()
        else:
            self._build_known()
        self._tell()

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

    def _tell(self) -> None:
        """Tell whether code is on its way, if that is news."""
        if self.is_pending != self._is_told:
            self._is_told = self.is_pending
            self._pending(self.is_pending)

    def _end(self, result: CompileResult) -> None:
        forms, self._compiled_now = self._compiled_now, []
        done = {form: entry for form in forms if (entry := self._queue.pop(form))[0] in self._names}
        if result.problem is not None:
            for module in dict.fromkeys(module for module, _ in done.values()):
                self._refuse(module, [form for form, (of, _) in done.items() if of is module], result.problem)
                if module in self._names and module not in self._swapped:
                    # Nor is anything else of it.
                    del self._names[module]
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
        self._states[form] = "pending"
        self._readings.extend(functools.partial(self._read_job, job) for job in jobs)
        self._readings.append(functools.partial(self._swap, module, form))

    def expect(self) -> None:
        """Read what was compiled for such layers before an earlier start, until calls ask for it."""
        if known := self._known.jobs():
            self._has_imported()
            sketches = {_sketch(part) for parts in self._regions.values() for part in parts}
            self._readings.extend(functools.partial(self._read_job, job) for job in known if job.module in sketches)

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
        self.num_irregular += 1

    def _swap(self, module: nn.Module, form: str) -> None:
        if module not in self._names:
            return
        self._states[form] = "built"
        self._changed(module)
        if module not in self._swapped:
            self._swapped.add(module)
            for part in self._regions[module]:
                self._compiles(part)
            self._note(self._names[module], "compiled")

    def refuse(self, invocation: Invocation, problem: str) -> None:
        """Calls of this form run eagerly from now on."""
        self._refuse(invocation.module, [self._form(invocation)], problem)

    def _refuse(self, module: nn.Module, forms: Sequence[str], problem: str) -> None:
        """What no process can compile calls do themselves, if that was asked for; else it stays as it is."""
        problem = problem[:_MAX_PROBLEM_CHARS]
        if self._inline is not None:
            self._say(module, f"compiled by its calls, as no other process can: {problem}")
            del self._names[module]
            self._inline(module)
            return
        patched = _patched(self._regions[module])
        for form in forms:
            self._states[form] = "refused"
            if patched is not None:
                self._patched[form] = patched
        self._say(module, f"some calls run without compilation: {problem}")

    def _is_outdated(self, form: str) -> bool:
        """Whether a form was refused because of adapters in its layers, which are gone; then nothing is known of it."""
        if form not in self._patched or "forward" in vars(self._patched[form]):
            return False
        del self._patched[form]
        return self._states.pop(form, None) is not None

    def _say(self, module: nn.Module, said: str) -> None:
        if (module, said) not in self._said:
            self._said.add((module, said))
            logger.warning("%s: %s", self._names[module], said)
            self._note(self._names[module], said)


def _patched(regions: Sequence[nn.Module]) -> nn.Module | None:
    """A layer that isn't what its class makes it, as with an adapter; None: there is none."""
    parts = (part for region in regions for part in region.modules())
    return next((part for part in parts if "forward" in vars(part)), None)


def _sketch(part: nn.Module) -> bytes | None:
    try:
        return sketched(part)
    except CannotSketch:
        return None


def _stance(name: Literal["force_eager", "fail_on_recompile"]) -> AbstractContextManager[Any]:
    return torch.compiler.set_stance(name)  # type: ignore[no-any-return]
