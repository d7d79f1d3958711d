"""Which components are on the device: those that are offloaded come for their calls and leave again."""

import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn
from torch.utils import swap_tensors
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True)
class Held:
    """An offloaded component that is on the device; `is_awaited`: a call waits for it."""

    name: str
    size_bytes: int
    is_awaited: bool


def leaving(needed_bytes: int, held: Sequence[Held], free_bytes: int) -> tuple[str, ...]:
    """Which components leave the device before another one computes there.

    1. Those that no call waits for.
    2. While there isn't room for what comes, the one that was used least recently.

    :param needed_bytes: what comes; 0 if it is on the device already.
    :param held: without the one that computes, by last use, the oldest first.
    """
    gone = [part for part in held if not part.is_awaited]
    free_bytes += sum(part.size_bytes for part in gone)
    for part in held:
        if free_bytes >= needed_bytes:
            break
        if part.is_awaited:
            gone.append(part)
            free_bytes += part.size_bytes
    return tuple(part.name for part in gone)


class Weights:
    """The weights of a component: on the host for ever, and on the device now and then.

    Modules see the same tensors, which get other contents; so nothing that refers to them has to know. To leave the
    device is to drop what is there: only what was written to meanwhile is copied back.

    :param pins: the host's copies are in pinned memory.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, pins: bool) -> None:
        self._module = module
        self._device = device
        self._pins = pins
        self._at_home: dict[torch.Tensor, tuple[torch.Tensor, int]] = {}
        """Tensor to its contents on the host, and the version that these are."""
        for tensor in self._tensors():
            self._keep(tensor)

    @property
    def size_bytes(self) -> int:
        """What it takes on the device."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def bring(self) -> None:
        """Have it on the device; what is launched on the current stream from now on finds it there."""
        for tensor in self._tensors():
            if tensor not in self._at_home:
                self._keep(tensor)  # it was added since, as adapters are
            home, _ = self._at_home[tensor]
            _put(tensor, home.to(self._device, non_blocking=self._pins, copy=True))
            self._at_home[tensor] = home, tensor._version

    def drop(self) -> None:
        """Free what it takes on the device."""
        for tensor in self._tensors():
            home, version = self._at_home.get(tensor, (tensor, -1))
            if tensor._version == version:
                _put(tensor, home)
                self._at_home[tensor] = home, tensor._version
            else:
                self._keep(tensor)

    def _keep(self, tensor: torch.Tensor) -> None:
        """Take a tensor's contents home."""
        home = tensor.detach().to("cpu")
        home = home.pin_memory() if self._pins else home
        _put(tensor, home)
        self._at_home[tensor] = home, tensor._version

    def _tensors(self) -> Iterator[torch.Tensor]:
        return chain(self._module.parameters(), self._module.buffers())


def _put(tensor: torch.Tensor, contents: torch.Tensor) -> None:
    """Give a tensor other contents; it stays the object that it is, and its version doesn't count that."""
    if not is_traceable_wrapper_subclass(tensor):
        tensor.data = contents
        return
    # Quantized weights, which are several tensors inside.
    fresh = contents.detach()
    swap_tensors(tensor, nn.Parameter(fresh, requires_grad=False) if isinstance(tensor, nn.Parameter) else fresh)


class Residency:
    """The offloaded components of a rank.

    :param device: where components compute, and what pipelines are told; None: wherever each is.
    :param offloaded: by name; all others are on the device for ever.
    :param free_bytes: what the device has room for now.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        offloaded: Mapping[str, tuple[nn.Module, Weights]] | None = None,
        free_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self.device = device
        self._free_bytes = free_bytes
        self._names = {module: name for name, (module, _) in (offloaded or {}).items()}
        self._weights = {name: weights for name, (_, weights) in (offloaded or {}).items()}
        self._held: OrderedDict[str, None] = OrderedDict()
        self._awaited: frozenset[str] = frozenset()
        self.join: Callable[[], None] = lambda: None
        """What is launched from now on comes after forwards on other streams, which use what comes and goes."""

    @property
    def held(self) -> tuple[str, ...]:
        """The offloaded components that are on the device, by last use."""
        return tuple(self._held)

    def is_offloaded(self, module: nn.Module) -> bool:
        """Whether a component comes and goes."""
        return module in self._names

    def expect(self, awaited: Collection[nn.Module]) -> None:
        """Calls of these components wait, and of no others."""
        self._awaited = frozenset(self._names[module] for module in awaited if module in self._names)

    def bring(self, module: nn.Module) -> None:
        """A component computes next: have it on the device, and those leave that aren't needed or have no room."""
        if not self._weights:
            return
        self.join()
        name = self._names.get(module)
        is_away = name is not None and name not in self._held
        others = [Held(n, self._weights[n].size_bytes, n in self._awaited) for n in self._held if n != name]
        needed = self._weights[name].size_bytes if name is not None and is_away else 0
        # To ask a GPU takes longer than all else here.
        self._drop(leaving(needed, others, self._free_bytes() if needed else 0))
        if name is None:
            return
        if is_away:
            self._bring(name)
        self._held[name] = None
        self._held.move_to_end(name)

    def make_room(self, module: nn.Module) -> bool:
        """The device has too little memory for a call of `module`: all others leave. False: there were none."""
        others = [name for name in self._held if name != self._names.get(module)]
        self._drop(others)
        return bool(others)

    def _bring(self, name: str) -> None:
        try:
            self._weights[name].bring()
        except torch.OutOfMemoryError:
            self._weights[name].drop()  # what had room
            raise

    def _drop(self, names: Sequence[str]) -> None:
        for name in names:
            self._weights[name].drop()
            del self._held[name]


def free_bytes(device: torch.device) -> int:
    """What new tensors have room for: a GPU's free memory, and what the allocator holds of it but doesn't use."""
    if device.type != "cuda":
        return sys.maxsize
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def residency(device: torch.device, components: Mapping[str, nn.Module], *, pins: bool) -> Residency:
    """That of a model whose `components`, by name, are offloaded from a device; only a GPU needs pinned memory."""
    pins = pins and device.type == "cuda"
    offloaded = {name: (part, Weights(part, device, pins=pins)) for name, part in components.items()}
    return Residency(device, offloaded, lambda: free_bytes(device))
