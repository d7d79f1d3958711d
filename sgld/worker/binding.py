"""Binding a request to the pipeline: a copy in which everything with a state of its own belongs to the request.

Models become proxies, noise schedulers and guiders are copied, nested pipelines are bound in turn. Nothing is cast
or moved, and `__init__` doesn't run again.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, Self

from diffusers import DiffusionPipeline
from torch import nn

from sgld.errors import InvalidRequest
from sgld.models.backend import NEEDS_GRADIENTS
from sgld.sampling_params import StepCacheParams
from sgld.worker.calls import Call
from sgld.worker.deferred import Deferral, forced
from sgld.worker.proxy import ComponentProxy
from sgld.worker.runtime import Runtime
from sgld.worker.step_cache import StepCache
from sgld.worker.task import Task

# By name: to import them takes half a second.
_STATEFUL = {"SchedulerMixin", "BaseGuidance"}


def bind(
    pipeline: Any,
    task: Task,
    *,
    defers: bool = False,
    cache: StepCacheParams | None = None,
    runtime: Runtime | None = None,
) -> Any:
    """A copy of the pipeline for one task.

    :param defers: calls of the denoiser may return before they have run.
    :param cache: how calls of the denoiser are skipped.
    :param runtime: runs the components.
    :raises InvalidRequest: the pipeline needs gradients inside its `__call__`.
    """
    if NEEDS_GRADIENTS & {base.__name__ for base in type(pipeline).__mro__}:
        name = type(pipeline).__name__
        raise InvalidRequest(f"{name} needs gradients inside its __call__; it can be served with --backend diffusers")
    deferral = Deferral(task) if defers else None
    step_cache = StepCache(task, cache) if cache is not None else None
    return _Binding(task, deferral, step_cache, runtime).bound(pipeline, "")


def bind_whole(pipeline: Any, task: Task, pulse: Callable[[], None]) -> Any:
    """A copy of the pipeline for one task that runs its models itself, and alone; it may change them until it ends.

    :param pulse: called before each forward.
    """
    return _WholeBinding(task, pulse).bound(pipeline, "")


def release(bound: Any) -> None:
    """Empty a copy that `bind` made, and all that it has of its own.

    These refer to one another; until the garbage collector finds them they would hold the tensors of the request.
    """
    binding = vars(bound)["progress_bar"].__self__
    for own in binding.take_copies():
        vars(own).clear()


class _Binding:
    """Copies of one task; what appears twice in a pipeline is one copy."""

    def __init__(
        self, task: Task, deferral: Deferral | None, step_cache: StepCache | None, runtime: Runtime | None = None
    ) -> None:
        self._task = task
        self._deferral = deferral
        self._step_cache = step_cache
        self._runtime = runtime or Runtime()
        self._copies: dict[int, Any] = {}

    def bound(self, pipeline: Any, prefix: str) -> Any:
        bound = copy.copy(pipeline)
        self._copies[id(pipeline)] = bound
        # Through __dict__: __setattr__ of a pipeline derives its configuration anew from what is assigned.
        for name, value in list(vars(pipeline).items()):
            vars(bound)[name] = self._own(value, prefix + name)
        vars(bound)["progress_bar"] = self._progress_bar
        vars(bound)["maybe_free_model_hooks"] = lambda: None
        return bound

    def take_copies(self) -> list[Any]:
        copies, self._copies = list(self._copies.values()), {}
        if self._step_cache is not None:
            self._step_cache.clear()
        return copies

    def _own(self, value: Any, name: str) -> Any:
        if id(value) in self._copies:
            return self._copies[id(value)]
        bases = {base.__name__ for base in type(value).__mro__}
        if isinstance(value, nn.Module):
            return self._own_model(value, name)
        if isinstance(value, DiffusionPipeline):
            return self.bound(value, f"{name}.")
        if "ModularPipelineBlocks" in bases:
            own: Any = self._blocks(value, name)
        elif _STATEFUL & bases:
            own = copy.deepcopy(value)
        else:
            return value
        self._copies[id(value)] = own
        return own

    def _own_model(self, model: nn.Module, name: str) -> Any:
        """What stands in the place of a model."""
        proxy = ComponentProxy(model, name, self._hand_over, self._touched, self._runtime)
        self._copies[id(model)] = proxy
        return proxy

    def _blocks(self, blocks: Any, name: str) -> Any:
        """Blocks of a modular pipeline, which show progress themselves."""
        own = copy.copy(blocks)
        own.sub_blocks = copy.copy(blocks.sub_blocks)
        for key, block in blocks.sub_blocks.items():
            own.sub_blocks[key] = self._own(block, f"{name}.{key}")
        own.progress_bar = self._progress_bar
        return own

    def _hand_over(self, proxy: ComponentProxy, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = forced((args, kwargs))
        call: Call = proxy.call(method, args, kwargs, self._task.request_id)
        call.adapters = self._task.adapters.get(call.component)
        if self._step_cache is not None and call.kind == "denoise":
            known = self._step_cache.answer(call, proxy.context_name)
            if known is not None:
                return known
        if self._deferral is not None and call.kind == "denoise":
            return self._deferral.result_of(call)
        return self._task.hand_over(call)

    def _touched(self, component: nn.Module, what: str) -> None:
        # What waits was meant for the component as it is.
        self._task.settle()
        self._task.exclusive_because = self._task.exclusive_because or what
        self._task.remember(component)

    def _progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> "ProgressBar":
        if total is None:
            total = len(iterable) if isinstance(iterable, Sized) else self._task.num_steps
        return ProgressBar(self._task, total, iterable)


class _WholeBinding(_Binding):
    """The same with the models themselves."""

    def __init__(self, task: Task, pulse: Callable[[], None]) -> None:
        super().__init__(task, None, None)
        self._pulse = pulse

    def bound(self, pipeline: Any, prefix: str) -> Any:
        bound = super().bound(pipeline, prefix)
        del vars(bound)["maybe_free_model_hooks"]
        return bound

    def _own_model(self, model: nn.Module, name: str) -> Any:
        if self._task.remember(model):
            # Gone with all else that changes until its end.
            model.register_forward_pre_hook(lambda _module, _args: self._pulse())
        return model


class ProgressBar:
    """What pipelines get instead of a tqdm bar: it tells the task the steps."""

    def __init__(self, task: Task, total: int, iterable: Iterable[Any] | None = None) -> None:
        self._task = task
        self._iterable = iterable
        self.total = total
        self.n = 0
        task.began(total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        assert self._iterable is not None
        for item in self._iterable:
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        self.n += n
        self._task.stepped(self.n, self.total)

    def __getattr__(self, name: str) -> Any:
        """Everything else that tqdm has (set_postfix, set_description, close, ...) shows nothing."""
        return lambda *_args, **_kwargs: None
