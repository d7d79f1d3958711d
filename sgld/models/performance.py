"""What `--performance-mode` and `--enable-torch-compile` mean for a model: what is compiled, when, and by whom."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sgld.config import EngineConfig
from sgld.models.placement import regions

# To take over compiled code holds up a rank for some seconds, and it saves about a quarter of each forward (FLUX on an
# H200). Who has computed for a minute may do so once more, and only then does that pay; most single pictures take less.
_AUTO_AFTER_S = 60.0
# Forwards of smaller ones are kernels' launches, which CUDA graphs save without a compiler.
_MIN_BYTES = 2**30


@dataclass(frozen=True)
class Compilation:
    """How denoisers are compiled.

    `is_aside`: by a process of its own, while they go on as they are; else by their calls. `after_s`: when they have
    computed for so long. `is_asked_for`: by name, so where no process can do it calls do.
    """

    is_aside: bool = False
    after_s: float = 0.0
    is_asked_for: bool = False
    checks_size: bool = False

    def components(self, denoisers: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, str]]:
        """Which of them are compiled, and a note for each."""
        modules = {name: part for name, part in denoisers.items() if isinstance(part, nn.Module)}
        problems = {name: _problem(part) if self.checks_size else None for name, part in modules.items()}
        when = f" once it has computed for {self.after_s:g} s" if self.after_s else ""
        said = f"compiled by a process of its own{when}" if self.is_aside else "compiled"
        notes = {name: said if problem is None else f"not compiled: {problem}" for name, problem in problems.items()}
        return tuple(name for name, problem in problems.items() if problem is None), notes


def choose(config: EngineConfig, device_type: str, *, is_whole: bool) -> Compilation | None:
    """How denoisers are compiled; None: they aren't.

    1. Asked for by name: in any case. Where models run themselves, or on several GPUs, their calls compile them.
    2. For speed: by a process of its own, at once, where that can be.
    3. By itself: on a GPU, those that are large and repeat their layers, as that takes a minute or two; where times
       are calibrated at once, or they would be those of forwards that nobody runs for long.
    """
    can_be_aside = not is_whole and config.parallel.num_ranks == 1
    mode = config.memory.performance_mode
    if config.enable_torch_compile:
        return Compilation(is_aside=can_be_aside, is_asked_for=True)
    if mode == "speed" and can_be_aside:
        return Compilation(is_aside=True)
    if mode == "auto" and can_be_aside and device_type == "cuda":
        after_s = 0.0 if config.calibration.calibrate else _AUTO_AFTER_S
        return Compilation(is_aside=True, after_s=after_s, checks_size=True)
    return None


def _problem(module: nn.Module) -> str | None:
    """Why it isn't compiled unless that is asked for."""
    if regions(module) == [module]:
        return f"{type(module).__name__} names no layers that it repeats"
    size = sum(weight.nbytes for weight in module.parameters())
    return None if size >= _MIN_BYTES else f"{size / 2**20:.0f} MiB of weights are few"
