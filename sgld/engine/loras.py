"""Which LoRA adapters there are by name, and which are active: a function of what was asked for, without I/O.

What a request gets is decided when it comes: its adapters have paths then, and what is changed later concerns others
only.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from sgld.config import LoraConfig
from sgld.errors import InvalidRequest
from sgld.messages import LoraLoaded
from sgld.sampling_params import LoraChoice

ALL = "all"


class Registered(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter with a nickname; `size_bytes` and `num_layers` (by component) are known once it was loaded."""

    nickname: str
    path: str
    alpha: float | None = None
    size_bytes: int | None = None
    num_layers: dict[str, int] = {}
    num_unmatched: int = 0


@dataclass(frozen=True)
class Loras:
    """The adapters by nickname; what was chosen for requests that choose nothing, and whether it is active now."""

    registered: tuple[Registered, ...] = ()
    chosen: tuple[LoraChoice, ...] = ()
    is_active: bool = True

    @property
    def active(self) -> tuple[LoraChoice, ...]:
        return self.chosen if self.is_active else ()

    def resolved(self, choices: Sequence[LoraChoice] | None) -> tuple[LoraChoice, ...]:
        """The adapters of a request, each with its path; None: it has chosen nothing.

        :raises InvalidRequest: there is no such nickname.
        """
        return self.active if choices is None else tuple(map(self._with_path, choices))

    def _with_path(self, choice: LoraChoice) -> LoraChoice:
        if choice.path is not None:
            return choice
        known = self.find(choice.nickname or "")
        return msgspec.structs.replace(choice, path=known.path, alpha=choice.alpha or known.alpha)

    def find(self, nickname: str) -> Registered:
        """The adapter with this nickname.

        :raises InvalidRequest: there is none.
        """
        for adapter in self.registered:
            if adapter.nickname == nickname:
                return adapter
        names = [adapter.nickname for adapter in self.registered]
        close = difflib.get_close_matches(nickname, names, n=1)
        hint = (
            f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}" if names else "none is loaded"
        )
        raise InvalidRequest(f"there is no LoRA adapter {nickname!r}; {hint}", "lora")

    def with_registered(self, choices: Sequence[LoraChoice]) -> "Loras":
        """With these under their nicknames, in the place of what had those before."""
        new = [Registered(nickname=c.nickname, path=c.path, alpha=c.alpha) for c in choices if c.nickname and c.path]
        kept = [adapter for adapter in self.registered if adapter.nickname not in {a.nickname for a in new}]
        return replace(self, registered=(*kept, *new))

    def with_chosen(self, choices: Sequence[LoraChoice], target: str) -> "Loras":
        """With these for requests that choose nothing, in the place of those that had the same target.

        :raises InvalidRequest: that can't be told apart from what was chosen for all components.
        """
        kept = [choice for choice in self.chosen if target != ALL and choice.target != target]
        if any(choice.target == ALL for choice in kept):
            raise InvalidRequest(
                f"the adapters that are set now have target 'all', so {target!r} can't be set alone; set 'all'",
                "target",
            )
        return replace(self, chosen=(*kept, *choices), is_active=True)

    def switched(self, is_on: bool, strength: float | None = None) -> "Loras":
        """With the chosen ones active or not; `strength` is their scale from now on.

        :raises InvalidRequest: none is chosen.
        """
        if not self.chosen:
            raise InvalidRequest("no LoRA adapter is set; set one with /v1/set_lora", "lora")
        scaled = self.chosen
        if strength is not None:
            scaled = tuple(msgspec.structs.replace(choice, scale=strength) for choice in scaled)
        return replace(self, chosen=scaled, is_active=is_on)

    def without(self, nickname: str) -> "Loras":
        """Without an adapter.

        :raises InvalidRequest: there is none.
        """
        gone = self.find(nickname)
        return replace(
            self,
            registered=tuple(adapter for adapter in self.registered if adapter is not gone),
            chosen=tuple(choice for choice in self.chosen if choice.nickname != nickname),
        )

    def loaded(self, reply: LoraLoaded) -> "Loras":
        """With what the rank said of an adapter."""
        about = {name: getattr(reply, name) for name in ("size_bytes", "num_layers", "num_unmatched")}
        registered = tuple(
            msgspec.structs.replace(adapter, **about)
            if (adapter.path, adapter.alpha) == (reply.path, reply.alpha)
            else adapter
            for adapter in self.registered
        )
        return replace(self, registered=registered)


def of_config(config: LoraConfig) -> Loras:
    """The adapters that are there from the start; all of them are active."""
    parts = zip(config.nicknames, config.paths, config.scales, strict=True)
    choices = [
        LoraChoice(nickname=nickname, path=path, scale=scale, target=config.lora_target, alpha=config.lora_alpha)
        for nickname, path, scale in parts
    ]
    return Loras().with_registered(choices).with_chosen(choices, ALL)
