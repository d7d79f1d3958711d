"""The work that bench/compare.py compares, and what was to be reached: data."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from real_models import prompt

Kind = Literal["single", "staggered", "http"]
NUM_STAGGERED = 16
# Requests come so far apart; a plain pipeline is never done before the next one is there.
STAGGER_S = 0.05


@dataclass(frozen=True)
class Row:
    """One line of the table.

    :ivar size: height, width and perhaps num_frames.
    :ivar num_steps: of each request that is measured; of a staggered one they differ, and this is their mean.
    :ivar least: how many times faster than plain diffusers, eager, it was to be, end to end.
    :ivar least_denoise: the same for the denoising steps alone.
    :ivar least_compiled: the same against diffusers compiled by its own recipe.
    :ivar least_roof: the share of the device's arithmetic that denoising was to reach.
    :ivar within_s: seconds that an H200 may take.
    :ivar usual_steps: of a request as people send them, where that is too long to be measured.
    """

    name: str
    model: str
    size: Mapping[str, int] = field(hash=False)
    num_steps: int
    kind: Kind = "single"
    least: float | None = None
    least_denoise: float | None = None
    least_compiled: float | None = 1.0
    least_roof: float | None = None
    within_s: float | None = None
    usual_steps: int | None = None

    def steps_of(self, index: int) -> int:
        """20 to 30 where requests are staggered."""
        return 20 + index % NUM_STAGGERED * 10 // (NUM_STAGGERED - 1) if self.kind == "staggered" else self.num_steps

    def request(self, index: int, call: Mapping[str, Any]) -> dict[str, Any]:
        """Sampling params of the index-th request: each has a prompt and a seed of its own."""
        steps = {"num_inference_steps": self.steps_of(index)}
        return {"prompt": prompt(index), "seed": index, **self.size, **steps, **call}


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


_LONG = {"num_frames": 81, "height": 480, "width": 832}
_SHORT = {"num_frames": 17, "height": 256, "width": 256}
ROWS = {
    row.name: row
    for row in (
        Row("sdxl-1024", "sdxl", _square(1024), 30, least=1.6),
        Row("sdxl-512", "sdxl", _square(512), 30, least=3.8, least_compiled=1.25),
        Row("sdxl-512-staggered", "sdxl", _square(512), 25, "staggered", least=6.0),
        Row("flux-256", "flux", _square(256), 28, least=2.5, least_denoise=1.3, least_compiled=1.25),
        Row("flux-512", "flux", _square(512), 28, least=1.5, least_denoise=1.3),
        Row("flux-1024", "flux", _square(1024), 28, least=1.25, least_denoise=1.3, least_roof=0.72),
        Row("flux-256-staggered", "flux", _square(256), 25, "staggered", least=3.0),
        Row("flux-256-http", "flux", _square(256), 28, "http", within_s=0.8),
        Row("flux-512-http", "flux", _square(512), 28, "http", within_s=1.35),
        Row("flux-1024-http", "flux", _square(1024), 28, "http", within_s=3.9),
        Row("wan-17f-256", "wan", _SHORT, 20, least=3.5, least_compiled=1.25, usual_steps=50),
        Row("wan-81f-480p", "wan", _LONG, 6, least=1.35, least_roof=0.78, usual_steps=50),
        Row("qwen-image-512", "qwen-image", _square(512), 20),
        Row("qwen-image-1024", "qwen-image", _square(1024), 20),
        Row("z-image-512", "z-image", _square(512), 20),
        Row("z-image-1024", "z-image", _square(1024), 20),
        Row("sd3.5-medium-512", "sd3.5-medium", _square(512), 28),
        Row("sd3.5-medium-1024", "sd3.5-medium", _square(1024), 28),
    )
}
# What is compared where nothing is chosen: the rows that something was to be reached for.
CHOSEN = tuple(name for name, row in ROWS.items() if row.least or row.within_s)


def tiny(row: Row) -> Row:
    """The same row for a model with next to no layers."""
    size = {name: 5 if name == "num_frames" else 64 for name in row.size}
    return replace(row, size=size, num_steps=4)


@dataclass
class Measured:
    """One row, measured one way.

    :ivar warm_s: seconds of whole requests after the first; of a staggered row, of a request in the mean.
    :ivar step_ms: milliseconds of a denoising step, from the first one's end to the last one's.
    :ivar launch_us: what launching one small operation costs on that host.
    :ivar notes: what else is worth saying, by name.
    """

    row: str
    side: str
    first_s: float | None = None
    warm_s: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    launch_us: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)
