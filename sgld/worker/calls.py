"""Calls: what a task hands over instead of running a model itself, and the state of torch under which it does."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sgld.messages import CallKind
from sgld.worker.axes import CallAxes
from sgld.worker.invocation import Invocation
from sgld.worker.precision import Autocasts, autocasts
from sgld.worker.randomness import OwnRandom
from sgld.worker.rows import row_axes
from sgld.worker.runtime import Runtime
from sgld.worker.slots import Applied, Rows, capture_key, selected
from sgld.worker.trees import is_sequence, values

if TYPE_CHECKING:
    from sgld.worker.first_block import FirstBlockSite

_ids = count(1)


@dataclass(frozen=True)
class CallContext:
    """The thread-local state of torch under which a call was made; it belongs to the merge key."""

    is_grad_enabled: bool
    autocast: Autocasts
    default_device: torch.device
    cache: tuple[Any, ...] | None
    """Arguments of `cache_context`, where the component has a cache that reads them."""
    dtype: torch.dtype | None = None
    """In which the component computes, where its task asked for more than its weights have."""


def current_context(cache: tuple[Any, ...] | None = None, dtype: torch.dtype | None = None) -> CallContext:
    """The context of the calling thread."""
    return CallContext(
        is_grad_enabled=torch.is_grad_enabled(),
        autocast=autocasts(),
        default_device=torch.get_default_device(),
        cache=cache,
        dtype=dtype,
    )


@contextlib.contextmanager
def entered(context: CallContext, module: nn.Module) -> Iterator[None]:
    """Run a block in this thread under the context of a call of `module`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(context.is_grad_enabled))
        for device_type, dtype in context.autocast:
            stack.enter_context(torch.autocast(device_type, dtype))
        if context.default_device != torch.get_default_device():
            stack.enter_context(context.default_device)
        if context.cache is not None:
            name, fields = context.cache
            stack.enter_context(module.cache_context(name, **dict(fields)))  # type: ignore[operator]
        yield


@dataclass(eq=False)
class Call:
    """One invocation of a component by a task."""

    request_id: str
    component: str
    module: nn.Module
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: CallContext
    step_index: int = 0
    num_steps: int = 0
    around: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    """Entered around the invocation, in the executor's thread."""
    id: int = field(default_factory=lambda: next(_ids))
    runtime: Runtime = field(default_factory=Runtime)
    """Runs the component."""
    random: OwnRandom = field(default_factory=OwnRandom)
    """What the component draws from where it is given no generator."""
    site: "FirstBlockSite | None" = None
    """Where first blocks tell whether the others are skipped, what is known of these."""
    answered: Callable[[Any], None] = lambda value: None
    """Told the result, before the task sees it."""
    adapters: Applied | None = None
    """The request's adapters, if they change this component."""
    is_exact: bool = False
    """Its bits depend on nothing but its request: it runs the same kernels for the server's life."""
    axes: CallAxes | None = None
    """Which arguments count rows, where ranks may share these."""
    known_key: tuple[object, str | None] | None = None
    """The merge key, and what was known of merging when it was computed."""

    @property
    def tree(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as they were given: decorators of models look for some among the keywords only."""
        return self.args, self.kwargs

    @functools.cached_property
    def kind(self) -> CallKind:
        if self.method == "decode":
            return "decode"
        bases = type(self.module).__mro__
        is_denoiser = self.method == "forward" and any(base.__module__.startswith("diffusers.") for base in bases)
        return "denoise" if is_denoiser else "encode"

    # Cached, as they are asked for before and after the forward: models take things out of the dicts they are given.
    @functools.cached_property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors among the arguments."""
        return tuple(leaf for leaf in values(self.tree) if isinstance(leaf, torch.Tensor))

    @functools.cached_property
    def _list_of_rows(self) -> Sequence[torch.Tensor]:
        """The first argument, where it is a list that has a tensor for each sample."""
        first: Any = next(iter((*self.args, *self.kwargs.values())), ())
        return first if is_sequence(first) and all(isinstance(item, torch.Tensor) for item in first) else ()

    @functools.cached_property
    def rows(self) -> int:
        """Samples along the batch axis, as far as the first argument tells."""
        return len(self._list_of_rows) or next((tensor.shape[0] for tensor in self.tensors if tensor.ndim), 1)

    @functools.cached_property
    def cost_key(self) -> str:
        """Calls with an equal one take the same time at the same number of rows."""
        arguments = (*self.args, *self.kwargs.values())
        of_one = values([a[:1] if self._list_of_rows and is_sequence(a) else a for a in arguments])
        shapes = ",".join("x".join(map(str, leaf.shape[1:])) for leaf in of_one if isinstance(leaf, torch.Tensor))
        kind = ("" if self.site is None else " first block") + (" exact" if self.is_exact else "")
        return f"{self.component}.{self.method}({shapes}){kind}"

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Rows = (), *, by_row: bool = False) -> Any:
        """Invoke the component with these arguments in this thread, under the call's context.

        :param rows: whose rows the arguments hold, where not all are its own; the result must be split before the
            component runs again.
        :param by_row: adapters are applied as where those of the rows differ.
        """
        whose = rows or [(self.adapters, 1)]
        fixed = None if by_row else self._fixed(whose)
        axes = row_axes(self.axes, self.tree, (args, kwargs)) if self.axes is not None else None
        dtype, is_exact, lends = self.context.dtype, self.is_exact, bool(rows)
        invocation = Invocation(self.module, self.method, args, kwargs, dtype, is_exact, fixed, lends, axes)
        with entered(self.context, self.module), self.around(), selected(whose, by_row=by_row):
            return self.runtime.run(invocation)

    def _fixed(self, rows: Rows) -> tuple[object, ...] | None:
        """What must be equal for two calls to share a graph, beside arguments; None: Python has to run in between."""
        if self.site is not None or self.context.cache is not None or self.around is not contextlib.nullcontext:
            return None
        return capture_key(rows)


class Stretch(Call):
    """What a pipeline that runs its models itself does until its next step; it runs in the thread of its task."""

    def __init__(self, request_id: str, name: str, size: str, kind: CallKind) -> None:
        super().__init__(request_id, name, nn.Identity(), kind, (), {}, current_context())
        self._kind: CallKind = kind
        self._size = size

    @functools.cached_property
    def kind(self) -> CallKind:
        return self._kind

    @functools.cached_property
    def cost_key(self) -> str:
        return f"{self.component}.{self.kind}({self._size})"
