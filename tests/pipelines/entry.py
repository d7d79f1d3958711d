"""What the tests know of one pipeline class."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Kwargs = dict[str, Any]


def _no_inputs(_index: int, _kwargs: Kwargs) -> Kwargs:
    return {}


@dataclass(frozen=True)
class Entry:
    """A pipeline of diffusers with tiny random components.

    `kwargs` suit it. Requests differ in prompt, seed, steps, in the argument `guidance`, and in what `inputs` makes of
    a request's index and kwargs: pictures, for example. `second`: kwargs of another size; None: half as wide, twice as
    high, so that it has as many tokens; {}: it has one size only. `variant` tells apart what has the same class.
    `merges`: whether several requests share forwards of the denoiser; `because`: why they don't.
    """

    build: Callable[[], Any]
    kwargs: Kwargs
    kind: str = "text to image"
    guidance: str | None = "guidance_scale"
    inputs: Callable[[int, Kwargs], Kwargs] = _no_inputs
    second: Kwargs | None = None
    variant: str = ""
    merges: bool = True
    because: str = ""

    @property
    def other_size(self) -> Kwargs:
        """Kwargs of another size, or none."""
        if self.second is not None:
            return self.second
        return {"height": 2 * self.kwargs["height"], "width": self.kwargs["width"] // 2}
