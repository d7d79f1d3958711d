"""Which calls run compiled code: no call waits for a compiler, which works in a process of its own.

A call whose form isn't known runs as it always did, and what its layers were given goes to that process. When they are
compiled, the next call of that form takes their code from the cache, which is a matter of seconds.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, assert_never

import torch
from torch import nn

from sgld.models.placement import compile_module, regions
from sgld.worker.aside import CompilerProcess, Known, Watch
from sgld.worker.builder import Builder
from sgld.worker.compiler import CompileJob
from sgld.worker.imports import Imports
from sgld.worker.invocation import Invocation
from sgld.worker.recent import Recent
from sgld.worker.sketch import CannotSketch

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
        self._num_irregular = 0
        """Calls that took longer than the next ones will, as there was no code for them, or they were watched."""
        self._names = dict(names)
        # A step cache has other modules in the place of these now and then.
        self._regions = {module: regions(module) for module in names}
        self._after_s, self._clock = after_s, clock
        self._note, self._changed, self._compiling = note, changed, compiling
        self._inline, self._compiles = inline, compiles
        self._said: set[tuple[nn.Module, str]] = set()
        self._states: Recent[State] = Recent()
        self._patched: Recent[nn.Module] = Recent()
        """Of forms that were refused while adapters were in their layers: one of these layers."""
        self._swapped: set[nn.Module] = set()
        self._busy_s = dict.fromkeys(names, 0.0)
        self._last_s = dict.fromkeys(names, clock())
        self._builder = Builder(
            self._names,
            Known(cache),
            built=self._swap,
            failed=self._failed,
            compiling=compiling,
            pending=pending,
            start=start,
            imports=imports,
            clock=clock,
        )

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._names

    @property
    def is_pending(self) -> bool:
        """Whether code is on its way that later calls will run."""
        return self._builder.is_pending

    @property
    def num_irregular(self) -> int:
        """Calls that took longer than the next ones will, and pauses between calls in which code was read."""
        return self._num_irregular + self._builder.num_read

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
            self._num_irregular += 1
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
        self._num_irregular += 1
        self._states[self._form(invocation)] = "missed"
        return True

    def look(self) -> None:
        """Between two calls: see whether a process is done, and read a part of what it compiled."""
        self._builder.look()

    def expect(self) -> None:
        """Read what was compiled for such layers before an earlier start, until calls ask for it."""
        self._builder.expect(part for parts in self._regions.values() for part in parts)

    def make_room(self) -> bool:
        """Memory is short: end the process, which has some of the device's, until more was computed; false: none is."""
        if (dropped := self._builder.give_up()) is None:
            return False
        for form, module in dropped:
            self._states.pop(form, None)
            self._busy_s[module] = 0.0
        return True

    def close(self) -> None:
        """End the process, if there is one."""
        self._builder.close()

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
        self._builder.submit(module, form, jobs)

    def _failed(self, module: nn.Module, forms: Sequence[str], problem: str) -> None:
        """No process could compile these."""
        self._refuse(module, forms, problem)
        if module in self._names and module not in self._swapped:
            # Nor is anything else of it.
            del self._names[module]

    def _swap(self, module: nn.Module, form: str) -> None:
        """The code of a form is there: the next call takes it."""
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


def _stance(name: Literal["force_eager", "fail_on_recompile"]) -> AbstractContextManager[Any]:
    return torch.compiler.set_stance(name)  # type: ignore[no-any-return]
