"""sgld: continuous batching of denoising steps for every diffusers pipeline."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from sgld import errors, events
from sgld.config import EngineConfig, OutputConfig, ParallelConfig
from sgld.sampling_params import FirstBlockCache, SamplingParams, TaylorCache

if TYPE_CHECKING:
    from sgld.engine.engine import Engine

__all__ = [
    "Engine",
    "EngineConfig",
    "FirstBlockCache",
    "OutputConfig",
    "ParallelConfig",
    "SamplingParams",
    "TaylorCache",
    "errors",
    "events",
]
try:
    __version__ = version("sgld")
except PackageNotFoundError:  # a checkout that isn't installed
    __version__ = "0+checkout"


def __getattr__(name: str) -> Any:
    """`sgld.Engine`, imported when it is used: the command line answers `--help` without it."""
    if name == "Engine":
        from sgld.engine.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
