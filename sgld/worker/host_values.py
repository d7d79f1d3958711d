"""What a noise scheduler asks of its device is answered by the host, where that knows it, so no step waits.

Noise schedulers choose numbers from tables by timestep, and compare timesteps. These lie on the device, so each such
question waits for all that the device was given before. The timesteps of a request don't change, so the host has a
copy. What is computed on the device is computed there as ever, with the same bits.
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


class Known(torch.Tensor):
    """A tensor of the device of which the host has a copy. What follows from such ones alone is known, too."""

    there: torch.Tensor
    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, there: torch.Tensor, host: torch.Tensor) -> "Known":
        made: Known = torch.Tensor._make_wrapper_subclass(
            cls, there.shape, strides=there.stride(), dtype=there.dtype, device=there.device
        )
        made.there, made.host = there, host
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        device = next(leaf.device for leaf in tensors if isinstance(leaf, Known))
        is_known = all(isinstance(leaf, Known) or leaf.device.type == "cpu" for leaf in tensors)
        to = kwargs.get("device")
        if is_known and (func in _ANSWERS or (to is not None and to.type == "cpu") or _is_table(func, args)):
            return func(*_mapped(args, "host"), **_mapped(kwargs, "host"))
        result = func(*_mapped(args, "there"), **_mapped(kwargs, "there"))
        if func._schema.is_mutable or not is_known:
            assert not func._schema.is_mutable or not isinstance(args[0], Known), "timesteps are what they are"
            return result
        on_host = {**_mapped(kwargs, "host"), **({"device": torch.device("cpu")} if to is not None else {})}
        return _paired(result, func(*_mapped(args, "host"), **on_host), device)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Known({self.host!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Known":
        return Known(self.there.clone(), self.host.clone())


def _is_table(func: Any, args: Any) -> bool:
    """Whether an operation takes something out of a table of the host."""
    return func is _aten.index.Tensor and args[0].device.type == "cpu"


def _mapped(tree: Any, side: str) -> Any:
    return tree_map(lambda leaf: getattr(leaf, side) if isinstance(leaf, Known) else leaf, tree)


def _paired(there: Any, host: Any, device: torch.device) -> Any:
    """Tensors of the device with their copies."""
    if isinstance(there, torch.Tensor):
        return Known(there, host) if there.device == device else there
    return type(there)(map(_paired, there, host, [device] * len(there))) if isinstance(there, list | tuple) else there


class HostTimesteps:
    """Goes around the steps of one noise scheduler.

    :param memory: what has the values of a tensor of the device in its storage.
    """

    def __init__(self, scheduler: Any, memory: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> None:
        self._scheduler, self._memory = scheduler, memory
        self._known: Known | None = None

    def __call__(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        timesteps = vars(self._scheduler).get("timesteps")
        if not isinstance(timesteps, torch.Tensor) or timesteps.device.type == "cpu":
            return step(*args, **kwargs)
        known = self._of(timesteps)
        args, kwargs = tree_map(lambda leaf: self._one_of(known, leaf), (args, kwargs))
        with self._in_place(known), _Pinning():
            return step(*args, **kwargs)

    def _of(self, timesteps: torch.Tensor) -> Known:
        """The timesteps with their copy, for which the device is waited for once."""
        if self._known is None or self._known.there is not timesteps:
            self._known = Known(timesteps, timesteps.cpu())
        return self._known

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
        return Known(leaf, known.host.reshape(-1)[index].expand(leaf.shape))

    @contextmanager
    def _in_place(self, known: Known) -> Iterator[None]:
        own = vars(self._scheduler)
        own["timesteps"] = known
        try:
            yield
        finally:
            if own.get("timesteps") is known:
                own["timesteps"] = known.there


def answer_from_host(bound: Any) -> None:
    """Have the noise schedulers of a bound pipeline wait for nothing in their steps."""
    for scheduler in schedulers_of(bound):
        scheduler.step = WatchedStep(scheduler, HostTimesteps(scheduler))


class _Pinning(TorchFunctionMode):
    """While the block runs, the host goes on while it copies to the device, and while that solves equations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist and isinstance(args[0], Known):
            return args[0].host.tolist()
        is_plain = func is torch.Tensor.to and "copy" not in kwargs and not isinstance(args[0], Known)
        if is_plain and args[0].device.type == "cpu":
            return _sent(args[0], func, args[1:], kwargs)
        if func in (torch.tensor, torch.as_tensor) and _is_far(device := kwargs.get("device")):
            made = func(*args, **{name: value for name, value in kwargs.items() if name != "device"})
            return _sent(made, torch.Tensor.to, (torch.device(device),), {})
        if func is torch.linalg.solve and not kwargs:
            # The same without a look at whether it could be solved.
            return torch.linalg.solve_ex(*args).result
        return func(*args, **kwargs)


def _is_far(device: Any) -> bool:
    return device is not None and torch.device(device).type != "cpu"


def _sent(tensor: torch.Tensor, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """`tensor.to(...)` through pinned memory, which the device reads when it comes to that."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or device.type != "cuda" or tensor.device.type != "cpu" or tensor.is_pinned():
        return func(tensor, *args, **kwargs)  # type: ignore[no-any-return]
    # As the host would convert it before it sends it.
    return tensor.to(dtype or tensor.dtype).pin_memory().to(device, non_blocking=True)
