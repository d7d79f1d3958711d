"""How a component is run: brought onto the device, in the precision that was asked for, compiled where that works.

What plain diffusers computes is computed. Where that would fail for want of memory, a compiler or a cast, it is tried
once more with what was missing.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sgld.messages import Variant
from sgld.models.attention_choice import native_only
from sgld.models.norms import fast_norms
from sgld.models.placement import compile_components, decompile, dtype_of
from sgld.outcome import message_of
from sgld.worker.graph_orders import GraphOrder
from sgld.worker.graphs import Graphs
from sgld.worker.invocation import Invocation
from sgld.worker.out_of_memory import one_error
from sgld.worker.precision import cast, computing_in, differs
from sgld.worker.residency import Residency
from sgld.worker.swap import COMPILED, IRREGULAR, Swap

if TYPE_CHECKING:
    from sgld.worker.leader import Leader

logger = logging.getLogger(__name__)
_MAX_PROBLEM_CHARS = 300


class Runtime:
    """Runs the components of one model, in the thread that owns the device.

    :param compiled: components that are compiled, by module, with their names.
    :param note: told what is found out of a component, for people.
    :param graphs: replays calls as CUDA graphs; None: all launch their kernels.
    """

    def __init__(
        self,
        residency: Residency | None = None,
        compiled: dict[nn.Module, str] | None = None,
        note: Callable[[str, str], None] = lambda component, note: None,
        graphs: Graphs | None = None,
    ) -> None:
        self.residency = residency or Residency()
        self.graphs = graphs
        self.swap: Swap | None = None
        """Has components compiled by another process."""
        self.num_compilations = 0
        """Forwards in which something was compiled took longer than the next ones will."""
        self.variant: Variant = "eager"
        """How the last invocation ran."""
        self.are_changed = False
        """A task changes components while it runs: they aren't what graphs were captured of."""
        self._compiled = dict(compiled or {})
        self._parts = {module: tuple(module.modules()) for module in self._compiled}
        """Of these; a step cache has others in the place of blocks now and then."""
        self._proven: set[nn.Module] = set()
        """Compiled components that have run."""
        self._eager: set[tuple[nn.Module, str]] = set()
        """Forms of calls of these that can't be compiled."""
        self._casts: set[tuple[nn.Module, str]] = set()
        """Components and methods that refuse arguments of another precision than their own."""
        self._note = note
        self._compiling: dict[nn.Module, Callable[[], AbstractContextManager[None]]] = {}
        """Entered around calls that compile their component, beside those that did so from the start."""
        self.ranks: Leader | None = None
        """Of several GPUs: run what they share."""

    @property
    def parts_rows(self) -> bool:
        """Whether several ranks may share the rows of a forward."""
        return self.ranks is not None and self.ranks.parts_rows

    def changed(self, because: str | None) -> None:
        """A task changes components until it ends, and how; None: it has ended."""
        if self.ranks is not None:
            self.ranks.changed_by = because

    def run(self, invocation: Invocation) -> Any:
        """Run a component: on all ranks, where they share it."""
        if self.ranks is not None and self.ranks.shares(invocation):
            return self.ranks.run(invocation, self)
        return self.run_here(invocation)

    def run_here(self, invocation: Invocation) -> Any:
        """Run a component on this rank."""
        module, is_exact = invocation.module, invocation.is_exact
        is_eager = (is_exact and self._has_code(module)) or (self.are_changed and self._has_swapped(module))
        with _eagerly(is_eager), self._kernels(invocation):
            result = self._run(invocation)
        if is_exact:
            self.variant = "eager"
        return result

    def _kernels(self, invocation: Invocation) -> AbstractContextManager[Any]:
        """Which compute what has no code of its own: torch's choice, or what is faster here."""
        if invocation.is_exact:
            return native_only()
        is_coder = invocation.method in ("encode", "decode")
        return fast_norms(invocation.module, self.residency.device) if is_coder else contextlib.nullcontext()

    def _run(self, invocation: Invocation) -> Any:
        # What a module computes in is asked for only where it matters: that walks through all of its parts.
        module = invocation.module
        if (module, invocation.method) in self._casts:
            invocation = _cast(invocation)
        try:
            return self._invoked(invocation)
        except torch.OutOfMemoryError:
            if not self.make_room(module) or invocation.is_shared:
                raise
            retry = self._invoked
        except RuntimeError as error:
            is_of_compiler = self._has_code(module) and _is_of_compiler(error)
            # What a model raises while it is traced has a name of its own.
            is_of_model = not is_of_compiler or type(error).__name__ == "TorchRuntimeError"
            if self.swap is not None and self.swap.missed(invocation, error):
                retry = self._invoked
            elif is_of_model and differs(invocation.tree, invocation.dtype or dtype_of(module)):
                retry = self._with_casts
            elif is_of_compiler:
                retry = functools.partial(self._uncompiled, problem=message_of(error, _MAX_PROBLEM_CHARS))
            else:
                raise
        # Here, where nothing refers to what the failed forward allocated.
        return retry(invocation)

    def make_room(self, module: nn.Module) -> bool:
        """Free what a call of `module` can do without; false if there is nothing."""
        # Graphs are only a cache, and what is compiled aside can be compiled later.
        freed = [cache.make_room() for cache in (self.graphs, self.swap) if cache is not None]
        return any(freed) or self.residency.make_room(module)

    @property
    def is_code_pending(self) -> bool:
        """Whether code is on its way that later calls will run."""
        return self.swap is not None and self.swap.is_pending

    def look(self) -> None:
        """Between two ticks: take over what was compiled meanwhile.

        Not within one, as a proof compares forwards that run alike; nor while components are changed, as what they
        were before comes back then.
        """
        if self.swap is not None and not self.are_changed:
            self.swap.look()

    def forget(self, module: nn.Module) -> None:
        """The component isn't what it was: its weights are others, or its code is."""
        if self.graphs is not None:
            self.graphs.forget(module)

    @property
    def num_irregular(self) -> int:
        """Forwards that took longer than the next ones will: something was compiled or captured in them."""
        parts = (self.graphs.num_trials if self.graphs else 0, self.swap.num_irregular if self.swap else 0)
        return self.num_compilations + sum(parts)

    def compile_inline(
        self, module: nn.Module, name: str, compiling: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """From now on calls of a component compile it themselves.

        :param compiling: entered around these.
        """
        compile_components({name: module})
        self._compiled[module] = name
        self._parts[module] = tuple(module.modules())
        self._compiling[module] = compiling

    def close(self) -> None:
        """End what runs beside this process."""
        if self.swap is not None:
            self.swap.close()

    def _has_code(self, module: nn.Module) -> bool:
        return module in self._compiled or self._has_swapped(module)

    def _has_swapped(self, module: nn.Module) -> bool:
        return self.swap is not None and self.swap.has_code(module)

    def unchanging(self, is_exact: bool) -> AbstractContextManager[Any]:
        """While the block runs components run the same kernels as ever, if `is_exact`: who runs them is no matter."""
        self.variant = "compiled" if self._compiled and not is_exact else "eager"
        return _eagerly(is_exact and bool(self._compiled))

    @contextlib.contextmanager
    def borrowed(self, module: nn.Module) -> Iterator[None]:
        """While the block runs a component is on the device, and computes without overflow."""
        self.residency.join()
        self.residency.bring(module)
        is_half = dtype_of(module) is torch.float16
        with computing_in(module, torch.float32 if is_half else None):
            yield

    @one_error()
    def _invoked(self, invocation: Invocation) -> Any:
        module = invocation.module
        self.residency.bring(module)
        is_eager = bool(self._eager) and (module, invocation.form) in self._eager
        self.variant = "compiled" if module in self._compiled and not is_eager else "eager"
        with computing_in(module, invocation.dtype), _eagerly(is_eager):
            result = self._forward(invocation)
        if module in self._compiled:
            self._proven.add(module)
        return result

    def _forward(self, invocation: Invocation) -> Any:
        """Compiled or not, as it is the turn of such calls."""
        module = invocation.module
        if self.swap is None or module not in self.swap or invocation.is_exact or self.are_changed:
            with self._compiling.get(module, contextlib.nullcontext)():
                return self._replayed(invocation)
        mode = self.swap.mode(invocation)
        self.variant = "compiled" if mode in COMPILED else "eager"
        forward = invocation.plain if mode in IRREGULAR else functools.partial(self._replayed, invocation)
        return self.swap.run(invocation, mode, forward)

    def _replayed(self, invocation: Invocation) -> Any:
        """As a CUDA graph, where that can be."""
        if self.graphs is None:
            return invocation.plain()
        if invocation.ordered is not None:
            result = self.graphs.obey(invocation, invocation.ordered)
        elif self._may_be_graph(invocation):
            # A graph of compiled code is another one, and the compiler may be done at any time.
            result = self.graphs.run(invocation, self.variant)
        else:
            return invocation.plain()
        if self.graphs.has_replayed:
            self.variant = "compiled graph" if self.variant == "compiled" else "graph"
        return result

    def order(self, invocation: Invocation, part: Hashable, ranks: Hashable = None) -> GraphOrder | None:
        """How ranks run what they share; None: eagerly.

        :param part: what of it each rank runs.
        :param ranks: which they are.
        """
        if self.graphs is None or not self._may_be_graph(invocation):
            return None
        variant: Variant = "compiled" if self._has_code(invocation.module) else "eager"
        return self.graphs.order(invocation, variant, part, ranks)

    def _may_be_graph(self, invocation: Invocation) -> bool:
        is_usual = not invocation.is_exact and not self.are_changed and invocation.dtype is None
        return is_usual and invocation.fixed is not None and not self.residency.is_offloaded(invocation.module)

    def _with_casts(self, invocation: Invocation) -> Any:
        """As the weights have it: plain diffusers would have stopped here."""
        result = self._run(_cast(invocation))
        self._casts.add((invocation.module, invocation.method))
        return result

    def _uncompiled(self, invocation: Invocation, problem: str) -> Any:
        """Without the compiler, and so from now on, if that works: else the call was wrong, not the compiler.

        1. Nothing of the component was ever compiled: nothing will be.
        2. Calls of other forms have run compiled. They stay so, and this form runs eagerly: a request that is sent
           twice gets the same bits.
        """
        module = invocation.module
        if self.swap is not None and module in self.swap:
            self.swap.refuse(invocation, problem)
            return self._invoked(invocation)
        was_proven = module in self._proven
        with _eagerly():
            result = self._run(invocation)
        self.variant = "eager"
        name = self._compiled[module]
        if was_proven:
            self._eager.add((module, invocation.form))
            note = f"some calls run without compilation: {problem}"
        else:
            decompile(self._parts.pop(module))
            del self._compiled[module]
            note = f"not compiled: {problem}"
        logger.warning("%s: %s", name, note)
        self._note(name, note)
        return result


def _cast(invocation: Invocation) -> Invocation:
    """With its arguments in the precision in which the component computes."""
    return invocation.having(cast(invocation.tree, invocation.dtype or dtype_of(invocation.module)))


def _eagerly(is_eager: bool = True) -> AbstractContextManager[Any]:
    """While the block runs nothing compiled does, if `is_eager`."""
    return torch.compiler.set_stance("force_eager") if is_eager else contextlib.nullcontext()


def _is_of_compiler(error: BaseException) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
