"""Results that materialise when touched: a task goes on past a call until it needs a number of its result.

Many pipelines call the denoiser twice in a step, one call after the other, for guidance. Neither call needs the
other's result, and so both can wait at the same time and share a forward. What the first call returns meanwhile is a
promise: tensors of the shape that an earlier step had, which fetch their values when an operation reads them. Slices,
views and casts of them are promises, too.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdRef

from sgld.worker.axes import is_constant
from sgld.worker.calls import Call
from sgld.worker.task import Task
from sgld.worker.trees import Path, at, leaves, rebuilt, values

_aten = torch.ops.aten
# What keeps the elements as they are: views, and casts, which are copies.
_VIEWS = {
    _aten.slice.Tensor,
    _aten.select.int,
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.unsqueeze.default,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.detach.default,
    _aten.alias.default,
}
_CAST = _aten._to_copy.default
# They read memory without an operation that could be seen.
_READS = {
    torch.Tensor.numpy,
    torch.Tensor.tolist,
    torch.Tensor.data_ptr,
    torch.Tensor.untyped_storage,
    torch.Tensor.__array__,
    torch.Tensor.__dlpack__,
    torch.Tensor.__deepcopy__,
    torch.Tensor.__reduce_ex__,
    torch.Tensor.__repr__,
}
# So many promises of a component may turn out to be of no use before no more are made to that task.
MAX_FUTILE = 2


@dataclass(frozen=True)
class Geometry:
    """What is known of a tensor before it is there; `stride` in elements."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self, device: torch.device | str) -> torch.Tensor:
        """A tensor like it, without values."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


def geometry_of(tensor: torch.Tensor) -> Geometry:
    """The geometry of a tensor that is there."""
    return Geometry(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


class Promise:
    """The result of a call that was posted.

    :param outline: a result of an earlier call like it, with geometries in the place of tensors.
    :param wait: returns the result, once; in the task's thread.
    """

    def __init__(self, outline: Any, wait: Callable[[], Any]) -> None:
        self._outline = outline
        self._wait: Callable[[], Any] | None = wait
        self._value: Any = None
        self._casts: list[WeakIdRef] = []

    @property
    def is_kept(self) -> bool:
        """Whether the result is there."""
        return self._wait is None

    def tree(self) -> Any:
        """The result, with promised tensors."""

        def promised(path: Path, node: Any) -> Any:
            return Deferred(self, node.empty("meta"), node.device, path) if isinstance(node, Geometry) else node

        return rebuilt(self._outline, promised)

    def tensor(self, path: Path) -> torch.Tensor:
        """The tensor at a path of the result; waits for it.

        :raises RuntimeError: it isn't what was promised.
        """
        if self._wait is not None:
            wait, self._wait = self._wait, None
            value = wait()
            self._value = rebuilt(value, lambda path, leaf: self._as_promised(path, leaf))
            # A cast is a copy: it must be made before somebody writes to what it is a copy of.
            for reference in self._casts:
                if (cast := reference()) is not None:
                    cast.value()
        tensor: torch.Tensor = at(self._value, path)
        return tensor

    def note_cast(self, cast: "Deferred") -> None:
        """Make this copy as soon as the result is there."""
        self._casts.append(WeakIdRef(cast))

    def _as_promised(self, path: Path, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        promised = at(self._outline, path)
        if (leaf.shape, leaf.dtype) != (promised.shape, promised.dtype):
            raise RuntimeError(
                f"a deferred result is {leaf.dtype} {tuple(leaf.shape)}, {promised.dtype} {tuple(promised.shape)} "
                "was promised"
            )
        return leaf if leaf.stride() == promised.stride else promised.empty(leaf.device).copy_(leaf)


class Deferred(torch.Tensor):
    """A tensor of a promised result, or a view or cast of another such tensor, its source."""

    _promise: Promise
    _shadow: torch.Tensor
    _path: Path
    _source: "Deferred | None"
    """A view of a cast shares memory with that cast, and so keeps it alive."""
    _follow: Callable[[torch.Tensor], torch.Tensor]
    _kept: torch.Tensor | None

    @staticmethod
    def __new__(
        cls,
        promise: Promise,
        shadow: torch.Tensor,
        device: torch.device,
        path: Path,
    ) -> "Deferred":
        made: Deferred = torch.Tensor._make_wrapper_subclass(
            cls,
            shadow.size(),
            strides=shadow.stride(),
            storage_offset=shadow.storage_offset(),
            dtype=shadow.dtype,
            device=device,
        )
        made._promise, made._shadow, made._path, made._source, made._kept = promise, shadow, path, None, None
        return made

    def value(self) -> torch.Tensor:
        """The tensor itself; waits for it."""
        if self._kept is None:
            base = self._promise.tensor(self._path)
            # Keeping the promise may have kept this, too.
            if self._kept is None:
                self._kept = base if self._source is None else self._follow(self._source.value())
        return self._kept

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            args = forced(args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _VIEWS or func is _CAST:
            deferred = args[0]
            if not deferred._promise.is_kept and kwargs.get("device") in (None, deferred.device):
                return deferred._followed_by(func, args[1:], kwargs)
        return func(*forced(args), **forced(kwargs))

    def _followed_by(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Deferred":
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        made = Deferred(self._promise, function(self._shadow, *args, **kwargs), self.device, self._path)
        made._source, made._follow = self, lambda source: function(source, *args, **kwargs)
        if function is _CAST:
            self._promise.note_cast(made)
        return made


def forced(tree: Any) -> Any:
    """The tree with values in the place of promises; waits for them. Without a promise it is the same tree."""
    if not any(isinstance(leaf, Deferred) for leaf in values(tree)):
        return tree
    return rebuilt(tree, lambda _path, node: node.value() if isinstance(node, Deferred) else node)


class Deferral:
    """Decides for one task which of its calls return at once, and makes their promises.

    A call does if its component was called more than once in an earlier step, and returned tensors of known geometry
    for such arguments. No promises are made any more where the pipeline looks at each result before its next call, or
    writes to what it gave to a call.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._outlines: dict[str, Any] = {}
        self._step = -1
        self._num_calls: Counter[str] = Counter()
        """Of each component, in this step."""
        self._paired: set[str] = set()
        self._num_futile = 0
        self._accompanied: set[Call] = set()
        """Calls that waited together with another."""
        self._watched: list[tuple[Call, list[tuple[torch.Tensor, int]]]] = []
        """Calls of this step, and the versions of their arguments."""

    def result_of(self, call: Call) -> Any:
        """In the task's thread: the result of the call, or a promise of it.

        :raises RuntimeError: arguments of a call that was promised were written to before it ran.
        """
        signature = _signature(call)
        is_unusual = signature is None or call.context.is_grad_enabled or call.context.cache is not None
        if is_unusual or self._task.exclusive_because is not None or self._num_futile >= MAX_FUTILE:
            return self._task.hand_over(call)
        assert signature is not None
        self._check_arguments()
        is_useful = call.component in self._paired and self._num_futile < MAX_FUTILE
        may_wait = is_useful and (outline := self._outlines.get(signature)) is not None
        self._note(call)
        if may_wait:
            self._task.post(call)
            if len(self._task.calls) > 1:
                self._accompanied.update(self._task.calls)
            return Promise(outline, lambda: self._kept(call)).tree()
        result = self._task.hand_over(call)
        self._outlines[signature] = outline_of(result)
        return result

    def _note(self, call: Call) -> None:
        if self._task.step != self._step:
            self._step = self._task.step
            self._num_calls.clear()
            self._watched.clear()
        self._num_calls[call.component] += 1
        if self._num_calls[call.component] > 1:
            self._paired.add(call.component)
        self._watched.append((call, [(tensor, tensor._version) for tensor in call.tensors]))

    def _kept(self, call: Call) -> Any:
        if call not in self._accompanied:
            self._num_futile += 1
        self._accompanied.discard(call)
        self._check_arguments()
        return self._task.wait(call)

    def _check_arguments(self) -> None:
        """See that what was given to calls is what it was.

        In the first step calls don't wait, and a pipeline that writes to their arguments shows it without harm.
        """
        for call, given in self._watched:
            if any(tensor._version != version for tensor, version in given):
                if call in self._task.calls:
                    raise RuntimeError(f"an argument of {call.component} was written to while the call waited")
                if self._task.step == self._step:
                    self._num_futile = MAX_FUTILE


def outline_of(result: Any) -> Any:
    """The result with geometries in the place of tensors; None where it holds what can't be promised."""
    if not all(isinstance(leaf, torch.Tensor) or is_constant(leaf) for leaf in values(result)):
        return None
    return rebuilt(result, lambda _path, leaf: geometry_of(leaf) if isinstance(leaf, torch.Tensor) else leaf)


def _signature(call: Call) -> str | None:
    """Calls with an equal one have results of the same geometry; None: this call can't be told from others."""
    parts: list[Any] = [call.component, call.method]
    for path, leaf in leaves(call.tree):
        if isinstance(leaf, torch.Tensor) and not leaf.is_inference():
            parts.append((path, leaf.dtype, leaf.shape))
        elif is_constant(leaf):
            parts.append((path, leaf))
        else:
            return None
    return repr(parts)
