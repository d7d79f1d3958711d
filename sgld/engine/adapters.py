"""The LoRA adapters of an engine: what it knows of them, and the talk with its rank about them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import anyio
import msgspec

from sgld.config import LoraConfig
from sgld.engine.loras import ALL, Loras, of_config
from sgld.errors import EngineClosed, InvalidRequest, RankLost
from sgld.messages import LoadLora, LoraFailed, LoraLoaded, LorasHeld, UnloadLora
from sgld.sampling_params import LoraChoice, SamplingParams

Source = tuple[str, float | None]


@dataclass
class _Load:
    """What came of reading an adapter, once the rank has said it; None: the rank was lost."""

    is_over: anyio.Event = field(default_factory=anyio.Event)
    reply: LoraLoaded | LoraFailed | None = None


class EngineLoras:
    """Names adapters, has them loaded, and says which of them a request gets.

    :param send: tells the rank; false if there is none.
    """

    def __init__(self, config: LoraConfig, send: Callable[[LoadLora | UnloadLora], bool]) -> None:
        self._state = of_config(config)
        self._send = send
        self._held = LorasHeld()
        self._loads: dict[Source, _Load] = {}

    @property
    def known(self) -> Loras:
        """The adapters that have nicknames, and those that are active."""
        return self._state

    @property
    def held(self) -> LorasHeld:
        """How much of them the rank holds."""
        return self._held

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

    def heard(self, reply: LoraLoaded | LoraFailed | LorasHeld) -> None:
        """The rank says something of adapters."""
        if isinstance(reply, LorasHeld):
            self._held = reply
            return
        if isinstance(reply, LoraLoaded):
            self._state = self._state.loaded(reply)
        self._end((reply.path, reply.alpha), reply)

    def lost(self) -> None:
        """The rank is gone; a new one loads what requests need."""
        self._held = LorasHeld()
        for source in list(self._loads):
            self._end(source, None)

    def _end(self, source: Source, reply: LoraLoaded | LoraFailed | None) -> None:
        if (load := self._loads.pop(source, None)) is not None:
            load.reply = reply
            load.is_over.set()

    async def _loaded(self, choice: LoraChoice) -> LoraLoaded:
        assert choice.path is not None, "it is resolved"
        load = self._loads.setdefault((choice.path, choice.alpha), _Load())
        if not self._send(LoadLora(path=choice.path, alpha=choice.alpha)):
            raise EngineClosed("the model isn't ready, so no adapter can be loaded")
        await load.is_over.wait()
        if load.reply is None:
            raise RankLost(f"the rank was lost while it loaded the LoRA adapter {choice}; try again")
        if isinstance(load.reply, LoraFailed):
            raise InvalidRequest(load.reply.message, "lora_path")
        if choice.target not in (ALL, *load.reply.num_layers):
            names = ", ".join(load.reply.num_layers)
            raise InvalidRequest(f"the adapter {choice} changes nothing in {choice.target!r}, but {names}", "target")
        return load.reply
