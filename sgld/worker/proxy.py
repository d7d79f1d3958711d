"""Interception: a task's copy of the pipeline holds a `ComponentProxy` in the place of each model.

Its calls become `Call`s, which the executor runs; everything else that a pipeline asks of a component goes to the real
one.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from sgld.models.placement import dtype_of
from sgld.worker.calls import Call, current_context
from sgld.worker.precision import is_wider, wanted
from sgld.worker.runtime import Runtime

INTERCEPTED_METHODS = frozenset({"forward", "encode", "decode", "generate"})
# A pipeline moves, casts and freezes its components as if they were its own; they are everybody's. A cast to more
# precision, as around the decoding of some VAEs, holds for the calls of the task.
CASTS = frozenset({"to", "float", "half", "bfloat16"})
INERT_METHODS = frozenset({"cuda", "cpu", "eval", "train", "requires_grad_"})
# Who asks for these is about to change a component for a while, and with it what all requests get. Guiders walk the
# named modules to hook some.
EXCLUSIVE_NAMES = frozenset(
    {"attn_processors", "set_attn_processor", "register_forward_hook", "register_forward_pre_hook", "named_modules"}
)


class ComponentProxy:
    """A component as a task sees it: the real one, except that its calls are handed over.

    Its `__class__` is the real one's, so `isinstance` holds. `modules()` is empty: pipelines walk the modules to
    scale LoRA layers or to find hooks, and must not do so to a component that they share.

    :param hand_over: gets the proxy, the method and its arguments, and returns its result.
    :param touched: told that the task is about to change the component, and how.
    :param runtime: runs the component, and knows where.
    """

    def __init__(
        self,
        real: nn.Module,
        name: str,
        hand_over: Callable[..., Any],
        touched: Callable[[nn.Module, str], None],
        runtime: Runtime | None = None,
    ) -> None:
        self.__dict__.update(_real=real, _name=name, _hand_over=hand_over, _touched=touched, _cache=None, _around={})
        self.__dict__.update(_runtime=runtime or Runtime(), _dtype=None, _places={})
        self.__dict__["__module__"] = type(real).__module__

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._real)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hand_over(self, "forward", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in EXCLUSIVE_NAMES:
            self._touched(self._real, f"{self._name}.{name}")
        if name in ("device", "dtype"):
            return self._place(name)
        value = getattr(self.__dict__["_real"], name)
        if name in INTERCEPTED_METHODS and callable(value):
            return functools.wraps(value)(lambda *args, **kwargs: self._hand_over(self, name, args, kwargs))
        if name in INERT_METHODS:
            return lambda *_args, **_kwargs: self
        if name in CASTS:
            return functools.partial(self._cast, name)
        if isinstance(value, nn.Module | torch.Tensor) or (inspect.ismethod(value) and not hasattr(nn.Module, name)):
            # A part, or a method that isn't handed over: the task uses it right away.
            self._runtime.residency.bring(self._real)
        return value

    def _place(self, name: str) -> Any:
        """Where it computes and in what, which isn't where it waits; the component itself is asked once.

        Models walk through all of their parts for the answer, 2 to 5 ms in large ones, and pipelines ask in each step.
        """
        known = self._runtime.residency.device if name == "device" else self._dtype
        if known is None and name not in self._places:
            self._places[name] = getattr(self._real, name)
        return known or self._places[name]

    def _cast(self, method: str, *args: Any, **kwargs: Any) -> "ComponentProxy":
        if (dtype := wanted(method, args, kwargs)) is not None:
            self.__dict__["_dtype"] = dtype if is_wider(dtype, dtype_of(self._real)) else None
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        self._touched(self._real, f"{self._name}.{name} = ...")
        setattr(self._real, name, value)

    def __repr__(self) -> str:
        return f"ComponentProxy({self._name}: {type(self._real).__name__})"

    def modules(self) -> Iterator[nn.Module]:
        return iter(())

    def _reset_stateful_cache(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing: the real method wipes the caches of all requests."""

    @contextlib.contextmanager
    def cache_context(self, name: str, **fields: Any) -> Iterator[None]:
        """Remember the context for the calls made inside it; the executor enters it where a cache is on."""
        self.__dict__["_cache"] = (name, tuple(sorted(fields.items())))
        try:
            yield
        finally:
            self.__dict__["_cache"] = None

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], request_id: str) -> Call:
        """The call of `method`, with the context of this thread."""
        has_cache = getattr(self._real, "is_cache_enabled", False)
        context = current_context(self._cache if has_cache else None, self._dtype)
        around = self._around.get(method, contextlib.nullcontext)
        runtime = self._runtime
        return Call(request_id, self._name, self._real, method, args, kwargs, context, around=around, runtime=runtime)

    def enter_around(self, method: str, around: Callable[[], AbstractContextManager[None]]) -> None:
        """Enter a context around each call of `method`, in the executor's thread."""
        self._around[method] = around

    @property
    def context_name(self) -> str:
        """What the pipeline calls the calls that it makes now; empty where it doesn't."""
        return self._cache[0] if self._cache is not None else ""

    @property
    def real(self) -> nn.Module:
        """The component itself."""
        return self.__dict__["_real"]  # type: ignore[no-any-return]


def real_of(component: Any) -> nn.Module:
    """The component itself, for which a proxy may stand."""
    return component.real if type(component) is ComponentProxy else component


def enter_around(component: Any, method: str, around: Callable[[], AbstractContextManager[None]]) -> None:
    """Enter a context around each call of a method, where it runs; of a component itself, as long as it is so."""
    if type(component) is ComponentProxy:
        component.enter_around(method, around)
        return
    real = getattr(component, method)

    def within(*args: Any, **kwargs: Any) -> Any:
        with around():
            return real(*args, **kwargs)

    vars(component)[method] = functools.wraps(real)(within)
