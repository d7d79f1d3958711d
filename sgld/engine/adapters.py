"""The LoRA adapters of an engine: what it knows of them, and the talk with its rank about them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import anyio
import msgspec

from sgld.config import LoraConfig
from sgld.engine.loras import ALL, Loras, of_config
from sgld.engine.routing import AdapterSource
from sgld.errors import EngineClosed, InvalidRequest, RankLost
from sgld.messages import LoadLora, LoraFailed, LoraLoaded, LorasHeld, UnloadLora
from sgld.sampling_params import LoraChoice, SamplingParams


@dataclass
class _Load:
    """What came of reading an adapter, once each rank has said it; None: a rank was lost."""

    is_over: anyio.Event = field(default_factory=anyio.Event)
    reply: LoraLoaded | LoraFailed | None = None
    told: set[int] = field(default_factory=set)
    """Replicas whose ranks read it."""
    heard: set[int] = field(default_factory=set)
    """Those that have said what came of it."""

    def end_if_over(self) -> None:
        """One that failed, or all that were told, end the wait."""
        is_bad = bool(self.heard) and not isinstance(self.reply, LoraLoaded)
        if is_bad or (self.told and self.told <= self.heard):
            self.is_over.set()


class EngineLoras:
    """Names adapters, has them loaded, and says which of them a request gets.

    :param send: tells the ranks; returns the replicas that have one.
    """

    def __init__(self, config: LoraConfig, send: Callable[[LoadLora | UnloadLora], Collection[int]]) -> None:
        self._state = of_config(config)
        self._send = send
        self._held: dict[int, LorasHeld] = {}
        """By replica."""
        self._loads: dict[AdapterSource, _Load] = {}

    @property
    def known(self) -> Loras:
        """The adapters that have nicknames, and those that are active."""
        return self._state

    def held(self, replica: int = 0) -> LorasHeld:
        """How much of them the rank of a replica holds, as it said last."""
        return self._held.get(replica, LorasHeld())

    def resolved(self, params: SamplingParams) -> SamplingParams:
        """The params with the adapters that a request gets if it comes now, and where these are.

        :raises InvalidRequest: there is no adapter with such a nickname.
        """
        if params.lora is None and not self._state.active:
            return params
        return msgspec.structs.replace(params, lora=self._state.resolved(params.lora))

    async def set(self, choices: Sequence[LoraChoice], target: str = ALL) -> None:
        """Load adapters, name them, and let requests that choose none have them.

        :raises InvalidRequest: one can't be read or doesn't fit, or there is no such nickname.
        :raises EngineClosed: the model isn't there.
        :raises RankLost: it was lost meanwhile.
        """
        resolved = self._state.resolved(choices)
        self._state.with_chosen(resolved, target)
        replies = [await self._loaded(choice) for choice in resolved]
        self._state = self._state.with_registered(resolved).with_chosen(resolved, target)
        for reply in replies:
            self._state = self._state.loaded(reply)

    def switch(self, *, is_on: bool, strength: float | None = None) -> None:
        """Let requests that choose no adapters have those that were set, or none.

        :raises InvalidRequest: none were set.
        """
        self._state = self._state.switched(is_on, strength)

    def unload(self, nickname: str) -> None:
        """Forget an adapter; requests that have it go on.

        :raises InvalidRequest: there is none.
        """
        gone = self._state.find(nickname)
        self._state = self._state.without(nickname)
        if all((adapter.path, adapter.alpha) != (gone.path, gone.alpha) for adapter in self._state.registered):
            self._send(UnloadLora(path=gone.path, alpha=gone.alpha))

    def heard(self, reply: LoraLoaded | LoraFailed | LorasHeld, replica: int = 0) -> None:
        """The rank of a replica says something of adapters."""
        if isinstance(reply, LorasHeld):
            self._held[replica] = reply
            return
        if isinstance(reply, LoraLoaded):
            self._state = self._state.loaded(reply)
        self._heard_from(replica, (reply.path, reply.alpha), reply)

    def lost(self, replica: int = 0) -> None:
        """The rank of a replica is gone; a new one loads what requests need."""
        self._held.pop(replica, None)
        for source, load in list(self._loads.items()):
            if replica in load.told:
                self._heard_from(replica, source, None)

    def _heard_from(self, replica: int, source: AdapterSource, reply: LoraLoaded | LoraFailed | None) -> None:
        load = self._loads.get(source)
        if load is not None and not load.is_over.is_set():
            load.heard.add(replica)
            load.reply = reply
            load.end_if_over()

    async def _loaded(self, choice: LoraChoice) -> LoraLoaded:
        assert choice.path is not None, "it is resolved"
        source = choice.path, choice.alpha
        load = self._loads.setdefault(source, _Load())
        load.told |= set(self._send(LoadLora(path=choice.path, alpha=choice.alpha)))
        try:
            if not load.told:
                raise EngineClosed("the model isn't ready, so no adapter can be loaded")
            load.end_if_over()
            await load.is_over.wait()
        finally:
            if self._loads.get(source) is load:
                del self._loads[source]
        if load.reply is None:
            raise RankLost(f"the rank was lost while it loaded the LoRA adapter {choice}; try again")
        if isinstance(load.reply, LoraFailed):
            raise InvalidRequest(load.reply.message, "lora_path")
        if choice.target not in (ALL, *load.reply.num_layers):
            names = ", ".join(load.reply.num_layers)
            raise InvalidRequest(f"the adapter {choice} changes nothing in {choice.target!r}, but {names}", "target")
        return load.reply
