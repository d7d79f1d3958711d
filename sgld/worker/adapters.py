"""The LoRA adapters of a rank: read in the background, kept in memory, put into slots when a request needs them."""

import functools
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from sgld.config import LoraConfig
from sgld.errors import InvalidRequest, ModelError
from sgld.messages import LorasHeld
from sgld.models.lora import Adaptable, Adapter, LoraLayer, adaptable, read
from sgld.models.lora_files import identity_now
from sgld.outcome import Raised, Value, on_failure, one_line, outcome_of
from sgld.sampling_params import LoraChoice
from sgld.worker.slots import Applied, Slots

_JOIN_S = 1.0


class Source(NamedTuple):
    """What an adapter is read from."""

    path: str
    alpha: float | None = None


def source_of(choice: LoraChoice) -> Source:
    """Where the adapter of a choice comes from; the engine knows the paths of nicknames."""
    assert choice.path is not None, f"{choice} was not resolved"
    return Source(choice.path, choice.alpha)


@dataclass(frozen=True)
class Loaded:
    """Reading has ended: with an adapter, or with why there is none."""

    source: Source
    result: Adapter | InvalidRequest


@dataclass
class _Combination:
    """Adapters with their scales, in slots of the components that they change."""

    adapters: frozenset[str]
    applied: dict[str, Applied]
    num_users: int = 0


class Adapters:
    """Not thread-safe, but for reading: that is done by a thread of its own, one adapter at a time.

    :param pipeline: what the adapters change.
    :param max_bytes: how much memory adapters take that no slot needs any more; those used last are kept.
    :param max_combinations: how many have slots at the same time.
    """

    def __init__(
        self,
        pipeline: Any,
        model: Adaptable,
        device: torch.device,
        *,
        max_bytes: int,
        max_combinations: int,
        read: Callable[[str, Adaptable, float | None], Adapter] = read,
    ) -> None:
        self._model = model
        self._read = read
        self._max_bytes = max_bytes
        self._max_combinations = max_combinations
        components: dict[str, nn.Module] = {name: getattr(pipeline, name) for name in model.targets}
        self._slots = {name: Slots(component, device, max_combinations + 1) for name, component in components.items()}
        self._adapters: OrderedDict[Source, Adapter] = OrderedDict()
        self._combinations: OrderedDict[str, _Combination] = OrderedDict()
        self._used: dict[str, str] = {}
        """Request id to the combination that it uses."""
        self._loading: set[Source] = set()
        self._wanted: queue.SimpleQueue[Source | None] = queue.SimpleQueue()
        self._read_ones: deque[Loaded] = deque()
        self._dropped: list[Source] = []
        self._thread: threading.Thread | None = None

    @property
    def slots(self) -> Mapping[str, Slots]:
        """The slots of each component that adapters may change."""
        return self._slots

    @property
    def is_loading(self) -> bool:
        return bool(self._loading)

    @property
    def has_news(self) -> bool:
        """Whether `collect` would return something."""
        return bool(self._read_ones)

    @property
    def size_bytes(self) -> int:
        """Of the adapters that are kept in memory."""
        return sum(adapter.size_bytes for adapter in self._adapters.values())

    def held(self) -> LorasHeld:
        """How much is held."""
        return LorasHeld(
            num_adapters=len(self._adapters),
            adapter_bytes=self.size_bytes,
            num_slots=len(self._combinations),
            slot_bytes=sum(slots.size_bytes for slots in self._slots.values()),
        )

    def all(self) -> list[Loaded]:
        """The adapters in memory."""
        return [Loaded(source, adapter) for source, adapter in self._adapters.items()]

    def num_layers(self, adapter: Adapter) -> dict[str, int]:
        """How many layers an adapter changes in each component, where it changes any."""
        return {name: len(layers) for name in self._slots if (layers := adapter.of(name, "all"))}

    def load(self, source: Source) -> Adapter | None:
        """The adapter as it is on disk; None: it is being read."""
        adapter = self._adapters.get(source)
        if adapter is not None and identity_now(source.path) in (None, adapter.identity):
            self._adapters.move_to_end(source)
            return adapter
        self._begin(source)
        return None

    def load_now(self, source: Source) -> Adapter:
        """Read an adapter in this thread.

        :raises InvalidRequest: it can't be read, or doesn't fit.
        """
        adapter = self._adapters[source] = self._read(source.path, self._model, source.alpha)
        return adapter

    def collect(self) -> list[Loaded]:
        """What was read since the last time; what could be read is there now."""
        found: list[Loaded] = []
        while self._read_ones:
            loaded = self._read_ones.popleft()
            self._loading.discard(loaded.source)
            if isinstance(loaded.result, Adapter):
                self._adapters[loaded.source] = loaded.result
            found.append(loaded)
        return found

    def unload(self, source: Source) -> None:
        """Forget an adapter; requests that use it go on."""
        adapter = self._adapters.pop(source, None)
        if adapter is not None:
            self._remove(key for key, c in self._combinations.items() if adapter.id in c.adapters)

    def unload_all(self) -> None:
        """Forget all adapters; what nobody uses leaves no trace in the components."""
        for source in list(self._adapters):
            self.unload(source)

    def use(
        self, request_id: str, choices: Sequence[LoraChoice], *, can_install: bool = True
    ) -> Mapping[str, Applied] | None:
        """What changes each component for a request, until it is released; None: an adapter or a slot isn't there yet.

        To be called between forwards.

        :param can_install: False: a task has changed components, and what it restores would lose a new slot.
        :raises InvalidRequest: no component has the name of a target, or an adapter changes nothing in it.
        """
        found = [(self.load(source_of(choice)), choice) for choice in choices]
        pairs = [(adapter, choice) for adapter, choice in found if adapter is not None]
        if len(pairs) < len(found):
            return None
        pairs = [(adapter, choice) for adapter, choice in pairs if choice.scale]
        if not pairs:
            return {}
        key = "+".join(f"{adapter.id}:{choice.target}*{choice.scale!r}" for adapter, choice in pairs)
        if key not in self._combinations and not (can_install and self._has_room()):
            return None
        if key not in self._combinations:
            self._combinations[key] = self._combined(key, pairs)
        self._combinations.move_to_end(key)
        self._combinations[key].num_users += 1
        self._used[request_id] = key
        return self._combinations[key].applied

    def release(self, request_id: str) -> None:
        """A request has ended; what it used may give way to others."""
        if (key := self._used.pop(request_id, None)) is not None:
            self._combinations[key].num_users -= 1

    def take_dropped(self) -> list[Source]:
        """Those that were forgotten for others since the last time."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def trim(self, needed: Iterable[Source]) -> None:
        """Forget adapters that were used least recently, until the rest fits, but none that is `needed`."""
        needed = set(needed)
        for source in list(self._adapters):
            if self.size_bytes <= self._max_bytes:
                return
            if source not in needed:
                del self._adapters[source]
                self._dropped.append(source)

    def close(self) -> None:
        """Leave the components as they were, and end the thread; where it is in the middle of a download it goes on."""
        self.unload_all()
        self._wanted.put(None)
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _has_room(self) -> bool:
        """Make room for one more combination, if it takes only those that nobody uses."""
        idle = (key for key, combination in self._combinations.items() if not combination.num_users)
        num_over = len(self._combinations) - self._max_combinations + 1
        self._remove([key for key, _ in zip(idle, range(max(0, num_over)), strict=False)])
        return len(self._combinations) < self._max_combinations

    def _remove(self, keys: Iterable[str]) -> None:
        for key in [key for key in keys if not self._combinations[key].num_users]:
            for applied in self._combinations.pop(key).applied.values():
                applied.slots.remove(key)

    def _combined(self, key: str, pairs: Sequence[tuple[Adapter, LoraChoice]]) -> _Combination:
        self._check_targets(pairs)
        applied: dict[str, Applied] = {}

        def remove() -> None:
            """Memory was too small for it."""
            for part in applied.values():
                part.slots.remove(key)

        with on_failure(remove):
            for component, slots in self._slots.items():
                if changes := _changes(component, pairs):
                    slots.put(key, changes)
                    applied[component] = Applied(slots, key)
        return _Combination(frozenset(adapter.id for adapter, _ in pairs), applied)

    def _check_targets(self, pairs: Sequence[tuple[Adapter, LoraChoice]]) -> None:
        for adapter, choice in pairs:
            if choice.target != "all" and not adapter.of(choice.target, choice.target):
                names = [name for name in self._slots if adapter.of(name, "all")]
                raise InvalidRequest(
                    f"the adapter {choice} changes nothing in {choice.target!r}; it changes {', '.join(names)}", "lora"
                )

    def _begin(self, source: Source) -> None:
        if source in self._loading:
            return
        self._loading.add(source)
        self._wanted.put(source)
        if self._thread is None:
            self._thread = threading.Thread(target=self._read_forever, name="adapters", daemon=True)
            self._thread.start()

    def _read_forever(self) -> None:
        # The executor has the cores.
        torch.set_num_threads(1)
        while (source := self._wanted.get()) is not None:
            # Without this thread nothing is read any more.
            match outcome_of(functools.partial(self._read, source.path, self._model, source.alpha)):
                case Value(value=adapter):
                    result: Adapter | InvalidRequest = adapter
                case Raised(error=InvalidRequest() as error):
                    result = error
                case Raised(error=error):
                    problem = f"{type(error).__name__}: {one_line(error)}"
                    result = InvalidRequest(f"the LoRA adapter {source.path!r} can't be read: {problem}", "lora")
            self._read_ones.append(Loaded(source, result))


def _changes(component: str, pairs: Sequence[tuple[Adapter, LoraChoice]]) -> dict[str, list[tuple[LoraLayer, float]]]:
    """What adapters change in a component, by module name."""
    changes: dict[str, list[tuple[LoraLayer, float]]] = {}
    for adapter, choice in pairs:
        for name, layer in adapter.of(component, choice.target).items():
            changes.setdefault(name, []).append((layer, choice.scale))
    return changes


def adapters_of(pipeline: Any, device: torch.device, config: LoraConfig) -> Adapters:
    """The adapters of a pipeline, with those that are there from the start.

    :raises ModelError: one can't be read, or doesn't fit.
    """
    model = adaptable(pipeline, refuses_unmatched=not config.lora_partial)
    max_bytes, max_combinations = config.max_lora_bytes, config.max_loras
    adapters = Adapters(pipeline, model, device, max_bytes=max_bytes, max_combinations=max_combinations)
    try:
        for path in config.paths:
            adapters.load_now(Source(path, config.lora_alpha))
    except InvalidRequest as error:
        raise ModelError(str(error)) from None
    return adapters
