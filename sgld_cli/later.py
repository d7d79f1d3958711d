"""Flags and config keys of SGLang Diffusion whose feature sgld doesn't have yet.

They are refused by name, so that nobody waits for the effect of a flag that does nothing. A value that only states
what is done today is accepted, so that a config file written for SGLang works as far as it can.
"""

import re
from typing import NamedTuple


class Later(NamedTuple):
    """A feature that isn't there yet, and the values (in lower case) that don't ask for it.

    `is_guess`: no table lists the name, it only looks like one.
    """

    feature: str
    today: tuple[str, ...] = ()
    is_guess: bool = False


_OFF = ("false", "0", "none", "null", "off")

LATER: dict[str, Later] = {
    # Adapters
    "lora_merge_mode": Later("adapters that are merged into the weights", today=("auto", "dynamic")),
    "lora_target_modules": Later("adapters for some layers only"),
    # Other configurations than the model's own
    "vae_config": Later("component configurations"),
    "dit_config": Later("component configurations"),
    # Compilation and caches
    "enable_cache_dit": Later("Cache-DiT for single requests; --cache skips steps in another way", today=_OFF),
    "enable_teacache": Later("TeaCache; --cache with method first_block is akin to it", today=_OFF),
    "regional_compile": Later("a choice of what is compiled", today=("true", "1")),
    # Memory
    "use_fsdp_inference": Later("sharded weights", today=_OFF),
    # Several machines
    "nnodes": Later("several machines", today=("1",)),
    # Inputs and reports
    "video_path": Later("input videos"),
    "pipeline_config_path": Later("pipeline configurations"),
    "perf_dump_path": Later("a report of timings"),
}

COMPONENT_PATH = re.compile(r"(?P<component>[a-z][a-z0-9_]*?)_path")
_WEIGHTS_PATH = re.compile(r"(?P<component>[a-z][a-z0-9_]*?)_weights_path")


def find_later(name: str) -> Later | None:
    """What `name` (with underscores) waits for; None for a name that isn't known at all."""
    if name in LATER:
        return LATER[name]
    if match := _WEIGHTS_PATH.fullmatch(name):
        return Later(f"other weights of {match['component']} than the model's own", is_guess=True)
    return None
