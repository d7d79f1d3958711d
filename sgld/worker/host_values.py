"""What a noise scheduler asks of its device is answered by the host, where that knows it, so no step waits.

Noise schedulers choose numbers from tables by timestep, and compare timesteps; some compare sigmas. These lie on the
device, so each such question waits for all that the device was given before. Those of a request don't change, so the
host has a copy. What is computed on the device is computed there as ever, with the same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from sgld.worker.steps import WatchedStep, schedulers_of

_aten = torch.ops.aten
_ANSWERS = {_aten._local_scalar_dense.default, _aten.is_nonzero.default, _aten.equal.default, _aten.nonzero.default}
"""What the host does with values."""
_TABLES = "timesteps", "sigmas"
_CARRIERS = frozenset({torch.Tensor.tolist, torch.Tensor.to, torch.tensor, torch.as_tensor, torch.linalg.solve})
"""They carry values from the host to the device or back."""
# Watching a step takes as long as launching some twenty kernels. Who asked for nothing in so many steps, which are more
# than methods of several steps need to begin with, won't: it looked its first timestep up.
MAX_SILENT = 3


class Known(torch.Tensor):
    """A tensor of the device of which the host has a copy. What follows from such ones alone is known, too.

    `asked`: what the host asked of it, and of what follows from it.
    """

    there: torch.Tensor
    host: torch.Tensor
    asked: list[Any]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, there: torch.Tensor, host: torch.Tensor, asked: list[Any] | None = None) -> "Known":
        made: Known = torch.Tensor._make_wrapper_subclass(
            cls, there.shape, strides=there.stride(), dtype=there.dtype, device=there.device
        )
        made.there, made.host, made.asked = there, host, [] if asked is None else asked
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = [leaf for leaf in tensors if isinstance(leaf, Known)]
        device = known[0].device
        is_known = all(isinstance(leaf, Known) or leaf.device.type == "cpu" for leaf in tensors)
        to = kwargs.get("device")
        if is_known and (func in _ANSWERS or (to is not None and to.type == "cpu") or _is_table(func, args)):
            for leaf in known:
                leaf.asked.append(func)
            return func(*_mapped(args, "host"), **_mapped(kwargs, "host"))
        result = func(*_mapped(args, "there"), **_mapped(kwargs, "there"))
        if func._schema.is_mutable and isinstance(args[0], Known):
            # Both in place, as views have the same memory.
            if is_known:
                func(*_mapped(args, "host"), **_mapped(kwargs, "host"))
            else:
                args[0].host.copy_(args[0].there)
            return args[0]
        if func._schema.is_mutable or not is_known:
            return result
        on_host = {**_mapped(kwargs, "host"), **({"device": torch.device("cpu")} if to is not None else {})}
        return _paired(result, func(*_mapped(args, "host"), **on_host), device, known[0].asked)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Known({self.host!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Known":
        return Known(self.there.clone(), self.host.clone(), self.asked)


def _is_table(func: Any, args: Any) -> bool:
    """Whether an operation takes something out of a table of the host."""
    return func is _aten.index.Tensor and args[0].device.type == "cpu"


def _mapped(tree: Any, side: str) -> Any:
    return tree_map(lambda leaf: getattr(leaf, side) if isinstance(leaf, Known) else leaf, tree)


def _paired(there: Any, host: Any, device: torch.device, asked: list[Any]) -> Any:
    """Tensors of the device with their copies."""
    if isinstance(there, torch.Tensor):
        return Known(there, host, asked) if there.device == device else there
    if not isinstance(there, list | tuple):
        return there
    return type(there)(_paired(one, own, device, asked) for one, own in zip(there, host, strict=True))


class HostTables:
    """Goes around the steps of one noise scheduler.

    :param memory: what has the values of a tensor of the device in its storage.
    """

    def __init__(self, scheduler: Any, memory: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> None:
        self._scheduler, self._memory = scheduler, memory
        self._known: dict[str, Known] = {}
        self._silent: Any = None
        """The timesteps of which nothing is asked any more."""
        self._num_silent = 0
        """Steps in turn that asked for nothing."""

    def __call__(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._silent is not None and vars(self._scheduler).get("timesteps") is self._silent:
            return step(*args, **kwargs)
        tables = {name: vars(self._scheduler).get(name) for name in _TABLES}
        known = {n: self._of(n, table) for n, table in tables.items() if isinstance(table, torch.Tensor)}
        used = {name: one for name, one in known.items() if one is not None}
        if (timesteps := used.get("timesteps")) is None:
            return step(*args, **kwargs)
        args, kwargs = tree_map(lambda leaf: self._one_of(timesteps, leaf), (args, kwargs))
        asked = [one.asked for one in used.values()]
        num_before = sum(map(len, asked))
        with self._in_place(used), _Pinning(timesteps.asked):
            result = step(*args, **kwargs)
        self._num_silent = self._num_silent + 1 if sum(map(len, asked)) == num_before else 0
        self._silent = timesteps.there if self._num_silent >= MAX_SILENT else None
        return result

    def _of(self, name: str, table: torch.Tensor) -> Known | None:
        """A table with its copy, for which the device is waited for once; None: it needs none.

        Most noise schedulers only compute with their sigmas, which takes longer with a copy: the first step tells.
        """
        if table.device.type == "cpu":
            return None
        known = self._known.get(name)
        if known is None or known.there is not table:
            self._known[name] = known = Known(table, table.cpu())
        elif name == "sigmas" and not known.asked:
            return None
        return known

    def _one_of(self, known: Known, leaf: Any) -> Any:
        """The copy of what is one of the timesteps, be it for several rows."""
        if type(leaf) is not type(known.there) or leaf.dtype != known.dtype:
            return leaf
        if any(num != 1 and step != 0 for num, step in zip(leaf.shape, leaf.stride(), strict=True)):
            return leaf
        one, whole = self._memory(leaf), self._memory(known.there)
        if one.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() or not whole.is_contiguous():
            return leaf
        index = one.storage_offset() - whole.storage_offset()
        if not 0 <= index < whole.numel():
            return leaf
        return Known(leaf, known.host.reshape(-1)[index].expand(leaf.shape), known.asked)

    @contextmanager
    def _in_place(self, known: dict[str, Known]) -> Iterator[None]:
        own = vars(self._scheduler)
        own.update(known)
        try:
            yield
        finally:
            own.update({name: one.there for name, one in known.items() if own.get(name) is one})


def answer_from_host(bound: Any) -> None:
    """Have the noise schedulers of a bound pipeline wait for nothing in their steps."""
    for scheduler in schedulers_of(bound):
        scheduler.step = WatchedStep(scheduler, HostTables(scheduler))


class _Pinning(TorchFunctionMode):
    """While the block runs, the host goes on while it copies to the device, and while that solves equations.

    :param asked: what of that was of use.
    """

    def __init__(self, asked: list[Any]) -> None:
        super().__init__()
        self._asked = asked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _CARRIERS:
            return func(*args, **kwargs)
        if func is torch.Tensor.tolist and isinstance(args[0], Known):
            self._asked.append(func)
            return args[0].host.tolist()
        is_plain = func is torch.Tensor.to and "copy" not in kwargs and not isinstance(args[0], Known)
        if is_plain and args[0].device.type == "cpu":
            return self._sent(args[0], func, args[1:], kwargs)
        if func in (torch.tensor, torch.as_tensor) and _is_far(device := kwargs.get("device")):
            made = func(*args, **{name: value for name, value in kwargs.items() if name != "device"})
            return self._sent(made, torch.Tensor.to, (torch.device(device),), {})
        if func is torch.linalg.solve and not kwargs:
            self._asked.append(func)
            # The same without a look at whether it could be solved.
            return torch.linalg.solve_ex(*args).result
        return func(*args, **kwargs)

    def _sent(self, tensor: torch.Tensor, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        """`tensor.to(...)` through pinned memory, which the device reads when it comes to that."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if not _is_far(device) or tensor.device.type != "cpu":
            return func(tensor, *args, **kwargs)  # type: ignore[no-any-return]
        self._asked.append(func)
        if device.type != "cuda" or tensor.is_pinned():
            return func(tensor, *args, **kwargs)  # type: ignore[no-any-return]
        # As the host would convert it before it sends it.
        return tensor.to(dtype or tensor.dtype).pin_memory().to(device, non_blocking=True)


def _is_far(device: Any) -> bool:
    return device is not None and torch.device(device).type != "cpu"
