"""A GPU that isn't there, for operations: computed on the CPU, and what crosses its border is counted."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sgld.worker.recorder import CaptureFailed, Forward, Unfit, Warmed
from sgld.worker.trees import opened, rebuilt

DEVICE = torch.device("meta")
_aten = torch.ops.aten
# What hands a number to the host, or makes a shape of values, waits for the device.
_WAITS = {
    _aten._local_scalar_dense.default,
    _aten.is_nonzero.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.bincount.default,
    _aten._linalg_check_errors.default,
}


class OnDevice(torch.Tensor):
    """A tensor of the device."""

    on_host: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnDevice":
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.on_host = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if not set(types) <= {torch.Tensor, nn.Parameter, OnDevice}:
            return NotImplemented
        raise RuntimeError(f"{func} of a tensor of the device outside of it")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.on_host!r})"


class _Functions(TorchFunctionMode):
    """What torch does in one go for its own devices only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("tensor", "as_tensor") and "device" in kwargs:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if name in ("item", "tolist") and isinstance(args[0], OnDevice):
            return func(args[0].cpu(), *args[1:], **kwargs)
        return func(*args, **kwargs)


class Device(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes as long as the block lasts, and counts what makes the host wait and what is uploaded."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.on_wait: Any = None
        self._tape: list[tuple[Any, Any, Any]] | None = None
        self._functions = _Functions()

    def __enter__(self) -> "Device":
        self._functions.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._functions.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not {type(leaf) for leaf in leaves} <= {torch.Tensor, nn.Parameter, OnDevice}:
            return NotImplemented  # the turn of others, who come back with these
        here = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
        host = [leaf for leaf in leaves if not isinstance(leaf, OnDevice)]
        to = kwargs.get("device")
        is_to_device = to is not None and torch.device(to).type == DEVICE.type
        is_away = to is not None and not is_to_device
        if func in (_aten._to_copy.default,) and to is not None and bool(here) is not is_to_device:
            self._crossed(func, here)
        elif func is _aten.copy_.default and len(here) == 1:
            self._crossed(func, here if here[0] is args[1] else [])
        elif here and (func in _WAITS or _selects(func, args)):
            self._wait(str(func))
        elif (
            here
            and (func not in (_aten._to_copy.default, _aten.set_.source_Tensor))
            and func is not _aten.copy_.default
            and any(t.ndim for t in host)
        ):
            if func not in (
                _aten.index.Tensor,
                _aten.index_put_.default,
                _aten.index_put.default,
                _aten._index_put_impl_.default,
            ):
                raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
            self._crossed(func, [])
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        bare = tree_map(lambda leaf: leaf.on_host if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
        out = func(*bare[0], **bare[1])
        if self._tape is not None and (here or is_to_device):
            self._tape.append((func, bare, out))
        if func is _aten._local_scalar_dense.default or is_away or not (here or is_to_device):
            return out
        if func is _aten.copy_.default or (func._schema.is_mutable and out is not None):
            known = {id(leaf.on_host): leaf for leaf in here}
            if isinstance(out, torch.Tensor) and id(out) in known:
                return known[id(out)]
            if isinstance(out, torch.Tensor) and any(out is leaf for leaf in host):
                return out
        return tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, torch.Tensor) else leaf, out)

    def _crossed(self, func: Any, here: list[Any]) -> None:
        if here:
            self._wait(str(func))
        else:
            self._check_border(str(func))
            self.uploads[str(func)] += 1

    @contextmanager
    def captured(self) -> Iterator[list[tuple[Any, Any, Any]]]:
        """What the device does in the block, as often as it is repeated. Nothing may cross its border meanwhile."""
        tape: list[tuple[Any, Any, Any]] = []
        self._tape = tape
        try:
            yield tape
        finally:
            self._tape = None

    def _check_border(self, what: str) -> None:
        if self._tape is not None:
            raise RuntimeError(f"{what} crosses the border of a device that is captured")

    def _wait(self, what: str) -> None:
        self._check_border(what)
        self.waits[what] += 1
        if self.on_wait is not None:
            self.on_wait(what)


def _selects(func: Any, args: Any) -> bool:
    """Indexing by a mask asks how many are in it."""
    if func not in (
        _aten.index.Tensor,
        _aten.index_put_.default,
        _aten._index_put_impl_.default,
        _aten.index_put.default,
    ):
        return False
    return any(isinstance(i, OnDevice) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def moved(module: nn.Module) -> nn.Module:
    """The module, on the device."""
    for part in module.modules():
        held: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in held:
            for name, value in tensors.items():
                if value is not None and not isinstance(value, OnDevice):
                    tensors[name] = OnDevice(value.detach())
    return module


class DeviceRecorder:
    """Captures what the device does."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.num_records = 0

    def warm_up(self, forward: Forward, tree: Any) -> Warmed:
        return Warmed(forward(tree), 1.0, 1.0)

    def record(self, forward: Forward, tree: Any, tensors: Sequence[torch.Tensor]) -> "DeviceRecording":
        self.num_records += 1
        inputs = [OnDevice(_on_host(tensor).clone()) for tensor in tensors]
        own = iter(inputs)
        static = rebuilt(tree, lambda _path, leaf: next(own) if isinstance(leaf, torch.Tensor) else leaf)
        try:
            with self._device.captured() as tape:
                outputs = opened(forward(static))
        except Unfit:
            raise
        except RuntimeError as error:
            raise CaptureFailed(str(error)) from None
        return DeviceRecording(inputs, tape, outputs)

    def timed(self, run: Callable[[], Any]) -> tuple[Any, float]:
        self._is_replay = not getattr(self, "_is_replay", False)
        return run(), 0.1 if self._is_replay else 1.0

    def renew(self) -> None:
        pass


class DeviceRecording:
    """What the device did, which it can do again."""

    size_bytes, pool_growth_bytes = 10, 100

    def __init__(self, inputs: list[OnDevice], tape: list[tuple[Any, Any, Any]], outputs: Any) -> None:
        self._inputs, self._tape, self._outputs = inputs, tape, outputs

    def replay(self, tensors: Sequence[torch.Tensor]) -> Any:
        for own, tensor in zip(self._inputs, tensors, strict=True):
            own.on_host.copy_(_on_host(tensor))
        for func, (args, kwargs), out in self._tape:
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif not any(returned.alias_info for returned in func._schema.returns):
                pairs = zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True)
                for old, new in ((old, new) for old, new in pairs if isinstance(old, torch.Tensor)):
                    old.copy_(new)
        return self._outputs


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    assert isinstance(tensor, OnDevice)
    return tensor.on_host
