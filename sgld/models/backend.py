"""Which backend runs a pipeline: the engine, which takes over the calls of its models, or diffusers alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

# Their `__call__` differentiates through the denoiser, which a call handed over can't do.
NEEDS_GRADIENTS = frozenset(
    {
        "StableDiffusionAttendAndExcitePipeline",
        "StableDiffusionDiffEditPipeline",
        "StableDiffusionPix2PixZeroPipeline",
        "CLIPGuidedStableDiffusion",
    }
)


@dataclass(frozen=True)
class Backend:
    """`is_whole`: each request runs the pipeline as diffusers has it, from start to end, one after the other."""

    is_whole: bool
    note: str | None = None
    """Why, for people."""


ENGINE = Backend(is_whole=False)


def choose_backend(
    asked: Literal["auto", "sglang", "sgld", "diffusers"],
    class_names: Iterable[str],
    modes: Mapping[str, str],
    needs_whole: str | None = None,
) -> Backend:
    """The backend of a pipeline.

    :param class_names: its class and, as far as known, the bases of that.
    :param modes: what was learned of its components: merge, interleave or exclusive.
    :param needs_whole: an option that is for requests that run whole.
    """
    exclusive = [name for name, mode in modes.items() if mode == "exclusive"]
    if asked in ("sglang", "sgld"):
        return ENGINE
    if asked == "diffusers":
        because = "asked for"
    elif needs_whole is not None:
        because = f"{needs_whole} is for that"
    elif NEEDS_GRADIENTS & set(class_names):
        because = "the pipeline needs gradients"
    elif exclusive:
        because = f"the pipeline was seen to change {exclusive[0]} while it runs"
    else:
        return ENGINE
    return Backend(is_whole=True, note=f"backend diffusers ({because}): requests run whole, one at a time")
