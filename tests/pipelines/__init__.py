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

# Those whose denoisers can share their tokens among ranks.
SHARING = (
    "aura_flow", "cogvideox", "cogvideox_image_to_video", "cogview_3_plus", "cogview_4", "flux", "flux2",
    "flux2_edit", "flux2_klein", "flux_control", "flux_controlnet", "flux_fill", "flux_img2img", "flux_inpaint",
    "flux_kontext", "flux_true_cfg", "hunyuan_video", "ltx", "ltx_2", "ltx_image_to_video", "modular_flux",
    "modular_flux_image_to_image", "modular_qwen_image", "modular_wan", "modular_z_image", "ovis_image", "pixart",
    "qwen_image", "qwen_image_controlnet", "qwen_image_edit", "qwen_image_edit_plus", "qwen_image_img2img",
    "qwen_image_inpaint", "sana", "sana_sprint", "sd3", "sd3_img2img", "wan", "wan_2_2", "wan_2_2_5b", "wan_i2v",
    "wan_vace", "wan_video_to_video", "z_image", "z_image_img2img",
)  # fmt: skip


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
