"""What a forward takes from the host to the device, where it is the same each time: a graph has it there beforehand.

Models make small tensors on the host in each forward, or keep tables there. A graph can't repeat such a copy, as the
host's memory may hold something else by then. The values can only follow from what the key of a graph holds and from
the state of the model, since nothing gets from the device to the host while a forward is captured.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sgld.worker.digests import digests
from sgld.worker.recorder import Unfit

_aten = torch.ops.aten
Taken = Callable[[torch.Tensor, torch.device], torch.Tensor]
"""From a tensor of the host, and the device that it goes to, to what stands there for it."""


class Uploads:
    """The tensors that one kind of call takes to the device, by their values.

    :param device_type: of the device; all else is on the host.
    """

    def __init__(self, device_type: str) -> None:
        self.order: list[str] = []
        """Of all that were taken in the watched forward."""
        self._device_type = device_type
        self._kept: dict[str, torch.Tensor] = {}

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._kept.values())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While the block runs, keep all that is taken to the device."""

        def keep(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
            self.order.append(value := _value(tensor))
            if value not in self._kept:
                self._kept[value] = tensor.to(device)
            return tensor

        with _Border(self._device_type, keep):
            yield

    @contextmanager
    def given(self) -> Iterator[None]:
        """While the block runs, nothing crosses the border: what was kept is there.

        :raises Unfit: something else is needed, or the host needs something of the device.
        """

        def hand_out(tensor: torch.Tensor, _device: torch.device) -> torch.Tensor:
            kept = self._kept.get(_value(tensor))
            if kept is None:
                raise Unfit("it copies something else to the device each time")
            return kept

        with _Border(self._device_type, hand_out, is_closed=True):
            yield


class _Border(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what operations take from the host to the device.

    :param is_closed: nothing gets from the device to the host.
    """

    def __init__(self, device_type: str, taken: Taken, *, is_closed: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device_type, self._taken, self._is_closed = device_type, taken, is_closed
        self._lifted: list[bool] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs as it would without this."""
        return True

    def __enter__(self) -> "_Border":
        # Else `torch.tensor(..., device=...)` copies where no mode sees it.
        self._lifted.append(torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch._C._set_only_lift_cpu_tensors(self._lifted.pop())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_closed and self._leaves(func, args, kwargs):
            raise Unfit("the host needs what it computes on the device")
        if (device := self._goes_to(func, args, kwargs)) is not None:

            def cross(leaf: Any) -> Any:
                return (
                    self._taken(leaf, device) if isinstance(leaf, torch.Tensor) and not self._is_there(leaf) else leaf
                )

            args, kwargs = tree_map(cross, (args, kwargs))
        return func(*args, **kwargs)

    def _is_there(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._device_type

    def _leaves(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether an operation gives values of the device to the host."""
        match func:
            case _aten._local_scalar_dense.default:
                return self._is_there(args[0])
            case _aten._to_copy.default:
                return self._is_there(args[0]) and (kwargs.get("device") or args[0].device).type != self._device_type
            case _aten.copy_.default:
                return self._is_there(args[1]) and not self._is_there(args[0])
        return False

    def _goes_to(self, func: Any, args: Any, kwargs: Any) -> torch.device | None:
        """The device to which an operation takes its tensors of the host; None: it takes none.

        A number in a tensor without axes comes to most operations as a number.
        """
        if func is _aten._to_copy.default:
            device = kwargs.get("device")
            is_upload = device is not None and device.type == self._device_type and not self._is_there(args[0])
            return device if is_upload else None
        if func is _aten.copy_.default:
            return args[0].device if self._is_there(args[0]) and not self._is_there(args[1]) else None
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = next((tensor.device for tensor in tensors if self._is_there(tensor)), None)
        return there if any(tensor.ndim and not self._is_there(tensor) for tensor in tensors) else None


def _value(tensor: torch.Tensor) -> str:
    """Equal for equal tensors only."""
    return f"{tensor.stride()}{next(iter(digests([tensor])))}"
