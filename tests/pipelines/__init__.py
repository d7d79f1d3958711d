"""Pipelines of diffusers with tiny random components, made here: no hub is reached.

Each module is a family and has its pipelines in `PIPELINES`, by name; to add one is to add an entry there.
"""

import importlib
import pkgutil
import warnings
from typing import Any

import torch

from pipelines.entry import Entry, Kwargs

# One of each way of calling a denoiser: enough where a test needn't see every pipeline.
TEN = ("flux", "sdxl", "sd3", "qwen_image", "z_image", "wan", "wan_i2v", "ltx", "cogvideox", "pixart")


def _found() -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for module in pkgutil.iter_modules(__path__):
        own = getattr(importlib.import_module(f"{__name__}.{module.name}"), "PIPELINES", {})
        assert entries.keys().isdisjoint(own), f"{module.name} has a name that another module has: {list(own)}"
        entries |= own
    return entries


BUILDERS = _found()


def build(name: str) -> tuple[Any, Kwargs]:
    """A pipeline, the same each time, and arguments that suit it."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # Models of diffusers that use what it deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        pipeline = BUILDERS[name].build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, dict(BUILDERS[name].kwargs)
